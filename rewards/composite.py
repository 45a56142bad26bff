"""Several rewards as one: missing values, weights, scales, and what each of them said."""

import asyncio
import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from rewards.balance import Scale, Watch, Weight, shares, weight_at

log = logging.getLogger(__name__)

Scores = dict[str, list[float | None]]  # reward's name → one raw score a completion


class CompositeReward:
    """A weighted sum of named rewards, callable as one TRL reward.

    A component that is missing (None) for a completion counts there as that component's mean over
    the others of the batch: it says nothing for or against. A completion that every component
    misses is missing itself. NaN and infinite scores become missing, are named in the log and
    counted in `quarantined`.
    """

    def __init__(
        self,
        rewards: dict[str, Callable],
        weights: Mapping[str, Weight] | None = None,
        scales: Mapping[str, Scale] | None = None,
    ):
        for given in (weights or {}, scales or {}):
            if unknown := given.keys() - rewards.keys():
                raise ValueError(
                    f"weights for rewards that are not there: {', '.join(sorted(unknown))}"
                )
        self.rewards = rewards
        self.weights: dict[str, Weight] = {name: (weights or {}).get(name, 1.0) for name in rewards}
        self.scales = {name: (scales or {}).get(name) or Scale() for name in rewards}
        self.watch = Watch()
        self.quarantined = dict.fromkeys(rewards, 0)
        self.metrics: dict[str, float] = {}  # what rewards reported through log_metric last
        self.extras: dict[str, list] = {}  # what they reported through log_extra, one a completion

    def __call__(self, prompts: list[str], completions: list[str], **columns) -> list[float | None]:
        return self.combine(self.score(prompts, completions, **columns))

    def score(self, prompts: list[str], completions: list[str], **columns) -> Scores:
        """What each reward says, raw."""
        return self.begin(prompts, completions, **columns)()

    def begin(self, prompts: list[str], completions: list[str], **columns) -> Callable[[], Scores]:
        """Starts to score; what is returned waits for the rest.

        Coroutine functions run at once and together in a thread of their own, so that their
        waiting costs nothing while something else is computed; the others have run on return. A
        reward whose `after_others` is true (a coroutine function too) is called last, with the
        others' scores as the column `scores`.
        """
        self.metrics, self.extras = {}, {}
        # TRL's trainer passes its own two; without one, they are kept here
        columns.setdefault("log_metric", lambda name, x: self.metrics.update({name: float(x)}))
        columns.setdefault("log_extra", self.extras.__setitem__)
        waits = [name for name, reward in self.rewards.items() if _waits(reward)]
        order = sorted(self.rewards.items(), key=lambda item: not _is_async(item[1]))
        answers: dict[str, Any] = {}
        thread = ThreadPoolExecutor(1)
        later: Future | None = None
        for name, reward in order:
            if name in waits:
                continue
            if later is None and not _is_async(reward):
                later = _started(thread, answers)
            with _blamed(name):
                answers[name] = reward(prompts=prompts, completions=completions, **columns)
        last = _started(thread, answers)

        def everything() -> Scores:
            for future in (later, last):  # the thread is one: it has done them by now
                if future is not None:
                    answers.update(future.result())
            known = {name: self._checked(name, answers[name], completions) for name in answers}
            if waits:
                given = {"prompts": prompts, "completions": completions} | columns
                given["scores"] = dict(known)
                told = asyncio.run(_gather({name: self.rewards[name](**given) for name in waits}))
                known |= {name: self._checked(name, told[name], completions) for name in waits}
            return {name: known[name] for name in self.rewards}

        future = thread.submit(everything)
        thread.shutdown(wait=False)  # takes nothing more, and ends by itself
        return future.result

    def combine(self, scores: Scores, step: int | None = None) -> list[float | None]:
        """The weighted sum for each completion, None where every component is missing.

        `step` is that of training, for scheduled weights; running scales learn from it. Without
        one they stay as they are, and weights are the first.
        """
        parts = self.parts(scores, step, learn=step is not None)
        return [
            None if all(score is None for score in row) else sum(part)
            for row, part in zip(
                zip(*scores.values(), strict=True), zip(*parts.values(), strict=True), strict=True
            )
        ]

    def parts(
        self, scores: Scores, step: int | None = None, learn: bool = False
    ) -> dict[str, list[float]]:
        """Each component's part of the sum; where it is missing, its mean over the batch."""
        result = {}
        for name, column in scores.items():
            scaled = self.scales[name](column, learn)
            known = [value for value in scaled if value is not None]
            mean = sum(known) / len(known) if known else 0.0
            weight = weight_at(self.weights[name], step or 0)
            result[name] = [weight * (mean if value is None else value) for value in scaled]
        return result

    def balance(self, scores: Scores, step: int, group_size: int) -> dict[str, float]:
        """After `combine` of the same step: each component's share of the advantages' variance,
        as trained on and raw, and its mean as trained on; warns where they do not balance."""
        parts = self.parts(scores, step)
        self.watch.see(parts, scores, group_size)
        if len(scores) < 2:
            return {}
        weighed = {
            name: [None if x is None else weight_at(self.weights[name], step) * x for x in column]
            for name, column in scores.items()
        }
        used, raw = shares(parts, group_size), shares(weighed, group_size)
        result = {}
        for name in scores:
            result[f"rewards/{name}/share"] = used[name]
            if self.scales[name].kind != "none" or self.scales[name].clip:
                result[f"rewards/{name}/share_raw"] = raw[name]
                result[f"rewards/{name}/scaled"] = sum(parts[name]) / len(parts[name])
        return result

    def state_dict(self) -> dict[str, Any]:
        """What running scales and warnings have learned, in plain numbers."""
        scales = {name: dict(scale.state) for name, scale in self.scales.items()}
        return copy.deepcopy({"scales": scales, "watch": self.watch.state})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, scale in state["scales"].items():
            self.scales[name].state = dict(scale)
        self.watch.state = copy.deepcopy(state["watch"])

    def interrupt(self) -> None:
        """Ends the waiting of rewards that wait for people; safe in a signal handler."""
        for reward in self.rewards.values():
            if hasattr(reward, "interrupt"):
                reward.interrupt()

    def close(self) -> None:
        """Gives back what rewards hold: a terminal, a port."""
        for reward in self.rewards.values():
            if hasattr(reward, "close"):
                reward.close()

    def _checked(self, name: str, answer: Any, completions: list[str]) -> list[float | None]:
        if not hasattr(answer, "__len__"):
            raise ValueError(f"reward {name!r} returned {answer!r}, not one score a completion")
        if len(answer) != len(completions):
            raise ValueError(
                f"reward {name!r} returned {len(answer)} scores for {len(completions)} completions"
            )
        scores: list[float | None] = []
        for value, completion in zip(answer, completions, strict=True):
            with _blamed(name):
                score = None if value is None else float(value)
            if score is not None and not math.isfinite(score):
                self.quarantined[name] += 1
                log.warning("reward %r is %s for %r: left out", name, score, completion[:80])
                score = None
            scores.append(score)
        return scores


def _is_async(reward: Callable) -> bool:
    return any(map(inspect.iscoroutinefunction, (reward, type(reward).__call__)))


def _waits(reward: Callable) -> bool:
    return getattr(reward, "after_others", False)


def _started(thread: ThreadPoolExecutor, answers: dict[str, Any]) -> Future | None:
    """Runs those of `answers` that are coroutines and not yet taken."""
    waiting = {name: answer for name, answer in answers.items() if inspect.isawaitable(answer)}
    for name in waiting:
        answers[name] = None
    return thread.submit(asyncio.run, _gather(waiting)) if waiting else None


async def _gather(waiting: dict[str, Any]) -> dict[str, list]:
    async def one(name: str) -> Any:
        with _blamed(name):
            return await waiting[name]

    return dict(zip(waiting, await asyncio.gather(*map(one, waiting)), strict=True))


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """Notes on what a reward raises whose it is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"reward {name!r}")
        raise
