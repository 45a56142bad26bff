"""Several rewards as one: weights, missing values, and what each of them said."""

import asyncio
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

Scores = dict[str, list[float | None]]  # reward's name → one raw score a completion


class CompositeReward:
    """A weighted sum of named rewards, callable as one TRL reward.

    A component that is missing (None) for a completion counts there as that component's mean over
    the others of the batch: it says nothing for or against. A completion that every component
    misses is missing itself. NaN and infinite scores become missing, are named in the log and
    counted in `quarantined`.
    """

    def __init__(self, rewards: dict[str, Callable], weights: dict[str, float] | None = None):
        if unknown := (weights or {}).keys() - rewards.keys():
            raise ValueError(
                f"weights for rewards that are not there: {', '.join(sorted(unknown))}"
            )
        self.rewards = rewards
        self.weights = dict.fromkeys(rewards, 1.0) | (weights or {})
        self.quarantined = dict.fromkeys(rewards, 0)
        self.metrics: dict[str, float] = {}  # what rewards reported through log_metric last
        self.extras: dict[str, list] = {}  # what they reported through log_extra, one a completion

    def __call__(self, prompts: list[str], completions: list[str], **columns) -> list[float | None]:
        return self.combine(self.score(prompts, completions, **columns))

    def score(self, prompts: list[str], completions: list[str], **columns) -> Scores:
        """What each reward says, raw; coroutine functions run concurrently."""
        self.metrics, self.extras = {}, {}
        # TRL's trainer passes its own two; without one, they are kept here
        columns.setdefault("log_metric", self.metrics.__setitem__)
        columns.setdefault("log_extra", self.extras.__setitem__)
        answers: dict[str, Any] = {
            name: reward(prompts=prompts, completions=completions, **columns)
            for name, reward in self.rewards.items()
        }
        waiting = {name: answer for name, answer in answers.items() if inspect.isawaitable(answer)}
        if waiting:
            answers |= zip(waiting, asyncio.run(_gather(list(waiting.values()))), strict=True)
        return {name: self._checked(name, answer, completions) for name, answer in answers.items()}

    def combine(self, scores: Scores) -> list[float | None]:
        """The weighted sum for each completion, None where every component is missing."""
        rows = list(zip(*scores.values(), strict=True))
        means = {}
        for name, column in scores.items():
            known = [value for value in column if value is not None]
            means[name] = sum(known) / len(known) if known else 0.0
        return [
            None
            if all(value is None for value in row)
            else sum(
                self.weights[name] * (means[name] if value is None else value)
                for name, value in zip(scores, row, strict=True)
            )
            for row in rows
        ]

    def _checked(self, name: str, answer: list, completions: list[str]) -> list[float | None]:
        if len(answer) != len(completions):
            raise ValueError(
                f"reward {name!r} returned {len(answer)} scores for {len(completions)} completions"
            )
        scores: list[float | None] = []
        for value, completion in zip(answer, completions, strict=True):
            score = None if value is None else float(value)
            if score is not None and not math.isfinite(score):
                self.quarantined[name] += 1
                log.warning("reward %r is %s for %r: left out", name, score, completion[:80])
                score = None
            scores.append(score)
        return scores


async def _gather(coroutines: list) -> list:
    return await asyncio.gather(*coroutines)
