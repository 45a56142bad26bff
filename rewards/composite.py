"""Several rewards as one: missing values, weights, scales, and what each of them said."""

import asyncio
import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from rewards.balance import Scale, Watch, Weight, filled, shares, weight_at
from rewards.messages import Text
from rewards.scores import checked, finite

log = logging.getLogger(__name__)

TAKEN = "the run logs something of its own under this name; choose another"
Scores = dict[str, list[float | None]]  # reward's name → one raw score per completion


class CompositeReward:
    """A weighted sum of named rewards, callable as one TRL reward.

    A component that is missing (None) for a completion counts there as that component's mean over
    the other completions of the same prompt, so that it says nothing for or against the completion
    among them; over the batch where the prompt has no other. A completion that every component
    misses is missing itself. Scores that are not finite or beyond 1e16 either way become missing,
    are logged and counted in `quarantined`. `reserved` tells the names that rewards may not report
    by log_metric or log_extra, because the program uses them.
    """

    def __init__(
        self,
        rewards: dict[str, Callable],
        weights: Mapping[str, Weight] | None = None,
        scales: Mapping[str, Scale] | None = None,
        reserved: Callable[[str], bool] = lambda name: False,
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
        self.extras: dict[str, list] = {}  # and through log_extra: one value per completion
        self.reserved = reserved

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns
    ) -> list[float | None]:
        """The weighted sums; completions of one prompt stand side by side, as in TRL's batches.

        Scheduled weights follow the global_step of `trainer_state`, which TRL passes.
        """
        state = columns.get("trainer_state")
        groups = [len(list(same)) for _, same in groupby(prompts)]
        scores = self.score(prompts, completions, **columns)
        return self.combine(scores, None if state is None else state.global_step, groups)

    def score(self, prompts: Sequence[Text], completions: Sequence[Text], **columns) -> Scores:
        """What each reward says, raw."""
        return self.begin(prompts, completions, **columns)()

    def begin(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns
    ) -> Callable[[], Scores]:
        """Starts to score; what is returned waits for the rest.

        Coroutine functions run at once and together in a thread of their own, so that their
        waiting costs nothing while something else is computed; the others have run on return. A
        reward whose `after_others` is true (a coroutine function too) is called last, with the
        others' scores as the column `scores`.
        """
        self.metrics, self.extras = {}, {}
        # TRL's trainer passes its own log_metric and log_extra; without one, they are kept here
        given = self._reports(len(completions)) | columns
        given |= {"prompts": prompts, "completions": completions}
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
                answers[name] = reward(**given)
        last = _started(thread, answers)

        def everything() -> Scores:
            for future in (later, last):  # the thread is one: it has done them by now
                if future is not None:
                    answers.update(future.result())
            known = {name: self._checked(name, answers[name], completions) for name in answers}
            if waits:
                asked = given | {"scores": dict(known)}
                told = asyncio.run(_gather({name: self.rewards[name](**asked) for name in waits}))
                known |= {name: self._checked(name, told[name], completions) for name in waits}
            return {name: known[name] for name in self.rewards}

        future = thread.submit(everything)
        thread.shutdown(wait=False)  # takes nothing more, and ends by itself
        return future.result

    def combine(
        self, scores: Scores, step: int | None = None, groups: int | Sequence[int] = 1
    ) -> list[float | None]:
        """The weighted sum for each completion, None where every component is missing.

        `step` is that of training, for scheduled weights; running scales learn from it. Without
        one they stay as they are, and weights are the first. `groups` is how many completions side
        by side have the same prompt: one number for all prompts, or one for each.
        """
        parts = self.parts(scores, step, groups, learn=step is not None)
        totals = [
            None if all(score is None for score in row) else sum(part)
            for row, part in zip(
                zip(*scores.values(), strict=True), zip(*parts.values(), strict=True), strict=True
            )
        ]
        if large := sum(not finite(total) for total in totals if total is not None):
            log.warning("the weighted sum of %d completions is beyond 1e16: left out", large)
        return [total if total is None or finite(total) else None for total in totals]

    def parts(
        self,
        scores: Scores,
        step: int | None = None,
        groups: int | Sequence[int] = 1,
        learn: bool = False,
    ) -> dict[str, list[float]]:
        """Each component's part of the sum; where it is missing, its mean over its prompt."""
        result = {}
        for name, column in scores.items():
            weight = weight_at(self.weights[name], step or 0)
            scaled = self.scales[name](column, learn)
            result[name] = [weight * value for value in filled(scaled, groups)]
        return result

    def balance(self, scores: Scores, step: int, group_size: int) -> dict[str, float]:
        """After `combine` of the same step: each component's share of the advantages' variance,
        as trained on and raw, and its mean as trained on; warns where they do not balance."""
        parts = self.parts(scores, step, group_size)
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
        """What running scales and warnings have learned and what was counted, in plain numbers."""
        scales = {name: dict(scale.state) for name, scale in self.scales.items()}
        state = {"scales": scales, "watch": self.watch.state, "quarantined": self.quarantined}
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`; what it has of rewards that are not here any more is left out."""
        for name in self.rewards.keys() & state["scales"].keys():
            self.scales[name].state = dict(state["scales"][name])
            self.quarantined[name] = state["quarantined"][name]
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

    def _reports(self, rows: int) -> dict[str, Callable]:
        """TRL's log_metric and log_extra, for a batch of `rows` completions."""

        def log_metric(name: str, value: Any) -> None:
            if self.reserved(name):
                raise ValueError(f"log_metric({name!r}, …): {TAKEN}")
            self.metrics[name] = float(value)

        def log_extra(name: str, values: Sequence) -> None:
            if self.reserved(name):
                raise ValueError(f"log_extra({name!r}, …): {TAKEN}")
            if len(values) != rows:
                raise ValueError(f"log_extra({name!r}, …): {len(values)} values for {rows} rows")
            self.extras[name] = list(values)

        return {"log_metric": log_metric, "log_extra": log_extra}

    def _checked(self, name: str, answer: Any, completions: Sequence[Text]) -> list[float | None]:
        with _blamed(name):
            scores, odd = checked(name, answer, completions)
        self.quarantined[name] += odd
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
