"""How several rewards are called at once: in which order, and which of them beside other work."""

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from rewards.base import Reward

Column = list[float | None]
SIGNALS_EVERY = 0.5  # seconds between looks for Ctrl-C, at most


def begin_calls(
    rewards: Mapping[str, Callable],
    given: dict[str, Any],
    check: Callable[[str, Any], Column],
) -> Callable[[], dict[str, Column]]:
    """Calls `rewards` with the keyword arguments `given`; what is returned waits for the answers.

    Coroutine functions run together in a thread of their own; the others have run on return. Those
    that come `after_others` are called last. `check(name, answer)` makes each answer a column. What
    a reward raises has a note that names it.
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
        with _named(name):
            answers[name] = reward(**given)
    second = _started(thread, answers)

    def checked(name: str, answer: Any) -> Column:
        with _named(name):
            return check(name, answer)

    def everything() -> dict[str, Column]:
        for future in (first, second):  # the thread is one: it has done them by now
            if future is not None:
                answers.update(future.result())
        known = {name: checked(name, answer) for name, answer in answers.items()}
        if later:
            asked = given | {"scores": dict(known)}
            last = asyncio.run(_gather({name: rewards[name](**asked) for name in later}))
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
        with _named(name):
            return await waiting[name]

    return dict(zip(waiting, await asyncio.gather(*map(one, waiting)), strict=True))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Notes on what a reward raises whose it is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"reward {name!r}")
        raise
