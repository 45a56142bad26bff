"""How several rewards are called at once: in which order, and which of them beside other work."""

import asyncio
import inspect
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NoReturn

from rewards.base import Column, Reward

RAISED_BY = "raised by the "  # begins the note on an error, before the name
SIGNALS_EVERY = 0.5  # seconds between looks for Ctrl-C, at most


def begin_calls(
    rewards: Mapping[str, Callable],
    given: dict[str, Any],
    check: Callable[[str, Any], Column],
) -> Callable[[], dict[str, Column]]:
    """Calls `rewards` with the keyword arguments `given`; what is returned waits for the answers.

    Coroutine functions run together in a thread of their own; the others have run on return. Those
    that come `after_others` are called last. Each has lists of its own, which it may change.
    `check(name, answer)` makes each answer a column. What a reward raises has a note that names it.
    """
    later = [name for name, reward in rewards.items() if _after_others(reward)]
    order = sorted(rewards.items(), key=lambda item: not _is_async(item[1]))
    answers: dict[str, Any] = {}
    thread = ThreadPoolExecutor(1)
    first: Future | None = None
    for name, reward in order:
        if name in later:
            continue
        if first is None and not _is_async(reward):
            first = _started(thread, answers)
        with _Named(name):
            answers[name] = reward(**_copied(given))
    second = _started(thread, answers)

    def checked(name: str, answer: Any) -> Column:
        with _Named(name):
            return check(name, answer)

    def everything() -> dict[str, Column]:
        for future in (first, second):  # the thread is one: it has done them by now
            if future is not None:
                answers.update(future.result())
        known = {name: checked(name, answer) for name, answer in answers.items()}
        if later:
            asked = given | {"scores": dict(known)}
            last = asyncio.run(_gather({name: rewards[name](**_copied(asked)) for name in later}))
            known |= {name: checked(name, last[name]) for name in later}
        return {name: known[name] for name in rewards}

    future = thread.submit(everything)
    thread.shutdown(wait=False)  # takes nothing more, and ends by itself

    def answer() -> dict[str, Column]:
        # Ctrl-C does not end a wait that begins just after it, or that it reaches in another thread
        while not wait([future], timeout=SIGNALS_EVERY).done:
            pass
        return future.result()

    return answer


def _is_async(reward: Callable) -> bool:
    if isinstance(reward, Reward):
        return reward.is_async
    return any(map(inspect.iscoroutinefunction, (reward, type(reward).__call__)))


def _after_others(reward: Callable) -> bool:
    return isinstance(reward, Reward) and reward.after_others


def _started(thread: ThreadPoolExecutor, answers: dict[str, Any]) -> Future | None:
    """Runs those of `answers` that are coroutines and not yet taken."""
    waiting = {name: answer for name, answer in answers.items() if inspect.isawaitable(answer)}
    for name in waiting:
        answers[name] = None
    return thread.submit(asyncio.run, _gather(waiting)) if waiting else None


async def _gather(waiting: dict[str, Any]) -> dict[str, list]:
    async def one(name: str) -> Any:
        try:
            with _Named(name):
                return await waiting[name]
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task and task.cancelling():  # because another reward has failed
                raise
            raise _as_failure(error, name) from error

    return dict(zip(waiting, await asyncio.gather(*map(one, waiting)), strict=True))


def _copied(value: Any) -> Any:
    """Lists and dicts of its own, for a reward that changes what it is given."""
    if type(value) is list:
        return [_copied(each) for each in value]
    if type(value) is dict:
        return {key: _copied(each) for key, each in value.items()}
    return value


class _Named:
    """Notes on what a reward raises whose it is; what would end the program is a failure, too.

    A child process that a reward forked, and that leaves it, ends here: it would go on as its
    parent, and write to the same files.
    """

    def __init__(self, name: str):
        self.name, self.process = name, os.getpid()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, frames: Any) -> None:
        if os.getpid() != self.process:
            _end_child(self.name, error)
        # A run has a handler of its own for Ctrl-C, which then raises nothing
        handled = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        if isinstance(error, SystemExit | GeneratorExit | StopIteration) or (
            isinstance(error, KeyboardInterrupt) and handled
        ):
            raise _as_failure(error, self.name) from error
        if isinstance(error, Exception):
            error.add_note(_note(self.name))


def _end_child(name: str, error: BaseException | None) -> NoReturn:
    left = f"raised {type(error).__name__}({error})" if error else "returned"
    said = f"reward {name!r}: a process that it forked {left} and is ended; use os._exit there\n"
    try:
        os.write(2, said.encode("utf-8", "backslashreplace"))
    finally:  # what is in the streams' buffers is the parent's to write
        os._exit(1)


def _as_failure(error: BaseException, name: str) -> RuntimeError:
    failure = RuntimeError(f"it raised {type(error).__name__}({error})")
    failure.add_note(_note(name))
    return failure.with_traceback(error.__traceback__)


def _note(name: str) -> str:
    return f"{RAISED_BY}reward {name!r}"
