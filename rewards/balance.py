"""How components of a composite are brought to one scale, and whether they pull together.

Scores are raw in every log; what is trained on is weight · clip(normalised score). Tensors are
float64: a column of scores is [B], all of them are [B, R]; NaN is missing.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.base import Weight

log = logging.getLogger(__name__)
MEMORY = 0.95  # of a running mean, per batch
WARN_AFTER = 20  # batches in a row that a warning rests on
DOMINATES, CONFLICTS = 0.95, -0.5


def weight_at(weight: Weight, step: float) -> float:
    """A number, or points (step, weight) with straight lines between them."""
    if isinstance(weight, int | float):
        return float(weight)
    steps, weights = zip(*sorted(weight), strict=True)
    return float(np.interp(step, steps, weights))


@dataclass
class Scale:
    """`kind` none, zscore (by running mean and deviation) or rank (in the batch, −1 to 1)."""

    kind: str = "none"
    clip: tuple[float, float] | None = None
    # Running weight, mean and square; mean and deviation of the first batch that differs.
    state: dict[str, float] = field(default_factory=dict)

    def __call__(self, column: Tensor, learn: bool) -> Tensor:
        """The column [B], normalised and clipped; missing stays missing."""
        missing = column.isnan()
        known = column[~missing]
        if learn and self.kind != "none" and "first_mean" not in self.state:
            mean, deviation = self._first(known)
            if deviation:
                self.state |= {"first_mean": mean, "first_deviation": deviation}
        if self.kind == "zscore" and len(known):
            state = self._with(known) if learn or "weight" not in self.state else self.state
            if learn:
                self.state = state
            column = _standard(column, state["mean"], _deviation(state["mean"], state["square"]))
        elif self.kind == "rank":
            # The lowest is below n − 1 others; ties have the middle of their places.
            column = (column[:, None] - known).sign().sum(-1) / max(len(known) - 1, 1)
        return self._clipped(column).masked_fill(missing, torch.nan)

    def fixed(self, column: Tensor) -> Tensor:
        """The column [B] on a scale that stays: steps can be compared, as zscores and ranks cannot.

        If normalised, in standard deviations from the mean of the first batch that was learned
        from and differed, before that of this one. Clipped; missing stays missing.
        """
        if self.kind != "none":
            column = _standard(column, *self._first(column[~column.isnan()]))
        return self._clipped(column)

    def _first(self, known: Tensor) -> tuple[float, float]:
        """Mean and deviation of the first batch; the running ones in a state that lacks them."""
        state = self.state
        if "first_mean" in state:
            return state["first_mean"], state["first_deviation"]
        if "weight" in state and (deviation := _deviation(state["mean"], state["square"])):
            return state["mean"], deviation
        if not len(known):
            return 0.0, 0.0
        mean = known.mean().item()
        return mean, _deviation(mean, known.square().mean().item())

    def _clipped(self, column: Tensor) -> Tensor:
        return column if self.clip is None else column.clamp(*self.clip)

    def _with(self, known: Tensor) -> dict[str, float]:
        """The running moments with this batch in them."""
        old = {"weight": 0.0, "mean": 0.0, "square": 0.0} | self.state
        weight = MEMORY * old["weight"] + 1
        mean, square = known.mean().item(), known.square().mean().item()
        return old | {
            "weight": weight,
            "mean": old["mean"] + (mean - old["mean"]) / weight,
            "square": old["square"] + (square - old["square"]) / weight,
        }


def _deviation(mean: float, square: float) -> float:
    """0 where values are equal but for rounding."""
    deviation = math.sqrt(max(square - mean * mean, 0.0))
    return deviation if deviation > 1e-6 * max(abs(mean), 1e-6) else 0.0


def _standard(column: Tensor, mean: float, deviation: float) -> Tensor:
    return (column - mean) / deviation if deviation else column * 0.0


def filled(scores: Tensor, groups: int | Sequence[int]) -> Tensor:
    """[B, R] with each missing value replaced by its reward's mean over its group.

    By the mean over the batch where the whole group is missing, and by 0 where everything is.
    `groups` are sizes: one for all, or one for each group in order.
    """
    whole = scores.nanmean(0).nan_to_num(0.0)
    sizes = groups if isinstance(groups, int) else list(groups)
    result = []
    for group in scores.split(sizes):
        mean = group.nanmean(0)
        mean = torch.where(mean.isnan(), whole, mean)
        result.append(torch.where(group.isnan(), mean, group))
    return torch.cat(result)


def shares(parts: Tensor, group_size: int) -> Tensor:
    """[R]: each part's share of the variance of the parts' sum within groups; they sum to 1.

    Negative where a part goes against the sum; all 0 where the sum does not vary.
    """
    centred = _centred(parts, group_size)
    total = centred.sum(1)
    variance = total @ total
    return total @ centred / variance if variance else torch.zeros_like(centred[0])


def correlations(parts: Tensor, group_size: int) -> Tensor:
    """[R, R], of each pair within groups; NaN where one of them does not vary."""
    centred = _centred(parts, group_size)
    norm = centred.norm(dim=0)
    return centred.T @ centred / (norm[:, None] * norm)


def _centred(parts: Tensor, group_size: int) -> Tensor:
    """Less the mean of its group, or of the batch where groups are of one; missing is 0."""
    groups = parts.split(group_size if group_size > 1 else len(parts))
    return torch.cat([(group - group.nanmean(0)).nan_to_num(0.0) for group in groups])


class BalanceMonitor:
    """Warns, once each, of what WARN_AFTER batches in a row have shown."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"counts": {}, "warned": []}

    def observe(self, names: Sequence[str], parts: Tensor, raw: Tensor, group_size: int) -> None:
        """`parts` and `raw` are [B, R]: as trained on, and as the rewards gave them."""
        if len(names) < 2:  # one alone shows in the sum
            return
        # Keyed by the text up to its first colon: the figures after it change.
        found = {text.split(":")[0]: text for text in _imbalances(names, parts, raw, group_size)}
        counts = {kind: self.state["counts"].get(kind, 0) + 1 for kind in found}
        self.state["counts"] = counts
        for kind, count in counts.items():
            if count >= WARN_AFTER and kind not in self.state["warned"]:
                self.state["warned"].append(kind)
                log.warning("%s (%d steps in a row)", found[kind], WARN_AFTER)


def _imbalances(names: Sequence[str], parts: Tensor, raw: Tensor, group_size: int) -> Iterator[str]:
    for name, column in zip(names, raw.T, strict=True):
        known = column[~column.isnan()]
        if not len(known):
            yield f"reward {name!r} is missing: it gives no completion a score"
        elif known.max() == known.min():
            yield f"reward {name!r} is saturated: it gives all completions the same score"
    for name, share in zip(names, shares(parts, group_size).tolist(), strict=True):
        if share > DOMINATES:
            yield (
                f"reward {name!r} dominates: it makes {share:.0%} of the advantages' variance; "
                "NORMALIZE or a smaller WEIGHT would let the others count"
            )
    matrix = correlations(parts, group_size)
    for i, j in combinations(range(len(names)), 2):
        if matrix[i, j] < CONFLICTS:
            yield (
                f"rewards {names[i]!r} and {names[j]!r} conflict: their correlation is "
                f"{matrix[i, j]:.2f}"
            )
