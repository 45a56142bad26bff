"""Several rewards as one: missing values, weights, scales, and what each of them reported."""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rewards.balance import BalanceMonitor, Scale, filled, shares, weight_at
from rewards.base import Column, Reward, Weight
from rewards.calling import begin_calls
from rewards.messages import Texts
from rewards.scores import LARGEST, as_list, as_tensor, checked, mean

log = logging.getLogger(__name__)

TAKEN = "the run logs something of its own under this name; choose another"


class CompositeReward:
    """A weighted sum of rewards, callable as one TRL reward.

    `rewards` are declarations, or callables with TRL's signature by name. A declaration brings its
    weight and scale; `weights` and `scales`, by name, are for other callables or replace them.

    A component that is missing (None) for a completion counts there as that component's mean over
    the other completions of the same prompt, so that it says nothing for or against the completion
    among them; over the batch where the prompt has no other. A completion that every component
    misses is missing itself. Scores that are not finite or beyond 1e16 either way become missing,
    are logged the first time and counted in `quarantined`. `reserved` says of a name whether the
    program uses it, so that rewards may not report under it by log_metric or log_extra.

    A weight that is a schedule goes by `trainer_state.global_step`, which TRL's trainers give.
    Elsewhere pass a `trainer_state` that has one, or the weight stays at its first value.
    """

    def __init__(
        self,
        rewards: Sequence[Reward] | Mapping[str, Callable],
        weights: Mapping[str, Weight] | None = None,
        scales: Mapping[str, Scale] | None = None,
        reserved: Callable[[str], bool] = lambda name: False,
    ):
        if not isinstance(rewards, Mapping):
            for reward in rewards:
                if not isinstance(reward, Reward):
                    raise TypeError(
                        f"{reward!r:.80} is no Reward of this package: give functions by name, "
                        'such as {"mine": my_function}, or as a PythonReward'
                    )
        by_name = rewards if isinstance(rewards, Mapping) else {r.name: r for r in rewards}
        self.rewards: dict[str, Callable] = dict(by_name)
        if len(self.rewards) < len(rewards):
            raise ValueError("two rewards have the same name: give one of them another `name`")
        for given in (weights or {}, scales or {}):
            if unknown := given.keys() - self.rewards.keys():
                raise ValueError(
                    f"weights for rewards that are not there: {', '.join(sorted(unknown))}"
                )
        # Other callables have no state, and nothing to end or give back
        self.declared = {name: r for name, r in self.rewards.items() if isinstance(r, Reward)}
        self.weights: dict[str, Weight] = dict.fromkeys(self.rewards, 1.0)
        self.weights |= {name: r.weight for name, r in self.declared.items()} | dict(weights or {})
        self.scales = {name: Scale() for name in self.rewards}
        self.scales |= {name: Scale(r.normalize, r.clip) for name, r in self.declared.items()}
        self.scales |= scales or {}
        self.monitor = BalanceMonitor()
        self.quarantined = dict.fromkeys(self.rewards, 0)
        self.told: set[str] = set()  # whose odd scores this process has logged
        self.metrics: dict[str, float] = {}  # what rewards reported through log_metric last
        self.extras: dict[str, list] = {}  # and through log_extra: one value per completion
        self.reserved = reserved

    @property
    def _scale_moves(self) -> bool:
        """Whether the same score counts differently in other steps: NORMALIZE, or a schedule."""
        normalised = any(scale.kind != "none" for scale in self.scales.values())
        return normalised or not all(isinstance(w, int | float) for w in self.weights.values())

    @property
    def names(self) -> list[str]:
        """Of the rewards, in the order of the columns of scores."""
        return list(self.rewards)

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> Column:
        """The weighted sums; completions of one prompt stand side by side, as in TRL's batches.

        Scheduled weights follow the global_step of `trainer_state`, which TRL passes.
        """
        if not self.rewards:
            raise ValueError("there are no rewards to sum: give CompositeReward at least one")
        state = columns.get("trainer_state")
        groups = [len(list(same)) for _, same in groupby(prompts)]
        scores = self.score(prompts, completions, **columns)
        return as_list(self.combine(scores, None if state is None else state.global_step, groups))

    def score(self, prompts: Texts, completions: Texts, **columns: Any) -> Tensor:
        """[B, R]: what each reward gives, raw; NaN where it is missing."""
        return self.begin(prompts, completions, **columns)()

    def begin(self, prompts: Texts, completions: Texts, **columns: Any) -> Callable[[], Tensor]:
        """Starts to score; what is returned waits for the rest and gives the scores.

        Rewards that are coroutine functions run at once and together in a thread of their own, so
        that their waiting costs nothing while something else is computed; the others have run on
        return.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
        self.metrics, self.extras = {}, {}
        # TRL's trainer passes its own log_metric and log_extra; without one, they are kept here
        # Several batches may be begun before one is waited for: each has reports of its own
        metrics, extras = self.metrics, self.extras
        given = self._reports(len(completions)) | columns
        given |= {"prompts": prompts, "completions": completions}

        def check(name: str, answer: Any) -> Column:
            scores, odd = checked(name, answer, completions, name in self.told)
            self.quarantined[name] += odd
            if odd:
                self.told.add(name)
            return scores

        wait = begin_calls(self.rewards, given, check)

        def scores() -> Tensor:
            found = as_tensor(list(wait().values()), len(completions))
            self.metrics, self.extras = metrics, extras
            return found

        return scores

    def over_batches(self, reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The metrics that rewards reported of several batches, as one: counts are added up."""
        counts = {f"{name}/{what}" for name, r in self.declared.items() for what in r.counts}
        result = {}
        for name in dict.fromkeys(name for report in reports for name in report):
            values = [report[name] for report in reports if name in report]
            result[name] = sum(values) / (1 if name in counts else len(values))
        return result

    def combine(
        self, scores: Tensor, step: int | None = None, groups: int | Sequence[int] = 1
    ) -> Tensor:
        """[B]: the weighted sum for each completion, NaN where every component is missing.

        `step` is that of training, for scheduled weights; running scales learn from it. Without
        one they stay as they are, and weights are the first. `groups` is how many completions side
        by side have the same prompt: one number for all prompts, or one for each.
        """
        return self._sum(self._parts(scores, step, groups, learn=step is not None), scores)

    def measure(self, scores: Tensor, groups: int | Sequence[int] = 1) -> Tensor:
        """[B]: the weighted sum on one scale for the whole run, by which steps can be compared.

        Weights are the last of their schedules; normalised rewards are on `Scale.fixed`.
        """
        scales = zip(self.scales.values(), scores.T, strict=True)
        scaled = torch.stack([scale.fixed(column) for scale, column in scales], 1)
        return self._sum(self._weights(math.inf) * filled(scaled, groups), scores)

    def _sum(self, parts: Tensor, scores: Tensor) -> Tensor:
        """[B] of parts [B, R]; NaN where all raw scores are missing, or the sum is absurd."""
        totals = parts.sum(1)
        if large := int((totals.abs() > LARGEST).sum()):
            log.warning("the weighted sum of %d completions is beyond 1e16: left out", large)
        left_out = (totals.abs() > LARGEST) | scores.isnan().all(1)
        return totals.masked_fill(left_out, torch.nan)

    def _parts(
        self, scores: Tensor, step: int | None, groups: int | Sequence[int], learn: bool = False
    ) -> Tensor:
        """[B, R]: each component's part of the sum; where it is missing, its mean over its prompt.

        The columns are scaled one by one, because each scale has a state of its own.
        """
        scales = zip(self.scales.values(), scores.T, strict=True)
        scaled = torch.stack([scale(column, learn) for scale, column in scales], 1)
        return self._weights(step) * filled(scaled, groups)

    def _weights(self, step: float | None) -> Tensor:
        weights = [weight_at(self.weights[name], step or 0) for name in self.rewards]
        return torch.tensor(weights, dtype=torch.float64)

    def report(self, scores: Tensor) -> dict[str, float | None]:
        """Each reward's mean over what is not missing, the share that is, and what it reported."""
        result: dict[str, float | None] = {}
        for name, column in zip(self.rewards, scores.T, strict=True):
            result[f"rewards/{name}/mean"] = mean(column)
            known = int((~column.isnan()).sum())
            if known < len(column):
                result[f"rewards/{name}/missing"] = 1 - known / len(column)
            if count := self.quarantined[name]:
                result[f"rewards/{name}/quarantined"] = count
        return result | self.metrics

    def balance(self, scores: Tensor, step: int, group_size: int) -> dict[str, float]:
        """After `combine` of the same step: each component's share of the advantages' variance,
        as trained on and raw, its mean as trained on, and the mean of `measure` where that is
        another sum; warns where they do not balance."""
        parts = self._parts(scores, step, group_size)
        self.monitor.observe(self.names, parts, scores, group_size)
        result: dict[str, float] = {}
        if self._scale_moves and (fixed := mean(self.measure(scores, group_size))) is not None:
            result["reward_fixed_scale"] = fixed
        if len(self.rewards) < 2:
            return result
        used = shares(parts, group_size).tolist()
        raw = shares(self._weights(step) * scores, group_size).tolist()
        for i, name in enumerate(self.rewards):
            result[f"rewards/{name}/share"] = used[i]
            if self.scales[name].kind != "none" or self.scales[name].clip:
                result[f"rewards/{name}/share_raw"] = raw[i]
                result[f"rewards/{name}/scaled"] = parts[:, i].mean().item()
        return result

    def state_dict(self) -> dict[str, Any]:
        """What running scales, warnings and rewards have learned and what was counted, plainly."""
        scales = {name: dict(scale.state) for name, scale in self.scales.items()}
        own = {name: reward.state_dict() for name, reward in self.declared.items()}
        state = {"scales": scales, "monitor": self.monitor.state, "quarantined": self.quarantined}
        return copy.deepcopy(state | {"rewards": {k: kept for k, kept in own.items() if kept}})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`; what it has of rewards that are not here any more is left out."""
        for name in self.rewards.keys() & state["scales"].keys():
            self.scales[name].state = dict(state["scales"][name])
            self.quarantined[name] = state["quarantined"][name]
        self.monitor.state = copy.deepcopy(state["monitor"])
        kept = state.get("rewards", {})  # an earlier version has none
        for name, reward in self.declared.items():
            if name in kept:
                reward.load_state_dict(copy.deepcopy(kept[name]))

    def interrupt(self) -> None:
        """Ends the waiting of rewards that wait for people; safe in a signal handler."""
        for reward in self.declared.values():
            reward.interrupt()

    def close(self) -> None:
        """Gives back what rewards hold: a terminal, a port."""
        for reward in self.declared.values():
            reward.close()

    def _reports(self, rows: int) -> dict[str, Callable]:
        """TRL's log_metric and log_extra, for a batch of `rows` completions."""
        metrics, extras = self.metrics, self.extras

        def log_metric(name: str, value: Any) -> None:
            if self.reserved(name):
                raise ValueError(f"log_metric({name!r}, …): {TAKEN}")
            try:
                metrics[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:  # the last is torch's
                raise ValueError(
                    f"log_metric({name!r}, …): {value!r:.60} is not one number"
                ) from error

        def log_extra(name: str, values: Sequence) -> None:
            if self.reserved(name):
                raise ValueError(f"log_extra({name!r}, …): {TAKEN}")
            if len(values) != rows:
                raise ValueError(f"log_extra({name!r}, …): {len(values)} values for {rows} rows")
            extras[name] = list(values)

        return {"log_metric": log_metric, "log_extra": log_extra}
