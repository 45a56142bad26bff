"""How components of a composite are brought to one scale, and whether they pull together.

Scores are raw in every log; what is trained on is weight · clip(normalised score).
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

log = logging.getLogger(__name__)
Column = Sequence[float | None]
Weight = float | Sequence[tuple[int, float]]
MEMORY = 0.95  # of a running mean, a batch
WATCHED = 20  # batches that a warning rests on
DOMINATES, CONFLICTS = 0.95, -0.5


def weight_at(weight: Weight, step: int) -> float:
    """A number, or points (step, weight) with straight lines between them."""
    if isinstance(weight, int | float):
        return float(weight)
    points = sorted(weight)
    for (begin, low), (end, high) in pairwise(points):
        if begin <= step < end:
            return low + (high - low) * (step - begin) / (end - begin)
    return points[0][1] if step < points[0][0] else points[-1][1]


@dataclass
class Scale:
    """`kind` none, zscore (by running mean and deviation) or rank (in the batch, −1 to 1)."""

    kind: str = "none"
    clip: tuple[float, float] | None = None
    state: dict[str, float] = field(default_factory=dict)  # weight, mean, square

    def __call__(self, column: Column, learn: bool) -> list[float | None]:
        """The column, normalised and clipped; missing stays missing."""
        known = [x for x in column if x is not None]
        if self.kind == "zscore" and known:
            state = self._with(known) if learn or not self.state else self.state
            if learn:
                self.state = state
            mean = state["mean"]
            deviation = math.sqrt(max(state["square"] - mean * mean, 0.0))
            # What is equal but for rounding has no deviation.
            small = deviation <= 1e-6 * max(abs(mean), 1e-6)
            result = [
                None if x is None else 0.0 if small else (x - mean) / deviation for x in column
            ]
        elif self.kind == "rank":
            result = [None if x is None else _rank(x, known) for x in column]
        else:
            result = list(column)
        if self.clip is None:
            return result
        low, high = self.clip
        return [None if x is None else min(max(x, low), high) for x in result]

    def _with(self, known: list[float]) -> dict[str, float]:
        """The running moments with this batch in them."""
        old = self.state or {"weight": 0.0, "mean": 0.0, "square": 0.0}
        weight = MEMORY * old["weight"] + 1
        mean = sum(known) / len(known)
        square = sum(x * x for x in known) / len(known)
        return {
            "weight": weight,
            "mean": old["mean"] + (mean - old["mean"]) / weight,
            "square": old["square"] + (square - old["square"]) / weight,
        }


def _rank(x: float, known: list[float]) -> float:
    """−1 for the lowest, 1 for the highest, the middle of its place for what is tied."""
    below, above = sum(y < x for y in known), sum(y > x for y in known)
    return (below - above) / max(len(known) - 1, 1)


def filled(column: Column, groups: int | Sequence[int]) -> list[float]:
    """The column with each missing value replaced by the mean of its group.

    By that of the column where its whole group is missing, and by 0 where everything is. `groups`
    are sizes: one for all, or one for each group in order.
    """
    sizes = [groups] * (len(column) // groups) if isinstance(groups, int) else groups
    whole, result, start = _mean(column, 0.0), [], 0
    for size in sizes:
        group = column[start : start + size]
        mean = _mean(group, whole)
        result += [mean if x is None else x for x in group]
        start += size
    return result


def _mean(column: Column, otherwise: float) -> float:
    """Over what is not missing; `otherwise` where everything is."""
    known = [x for x in column if x is not None]
    return sum(known) / len(known) if known else otherwise


def shares(parts: Mapping[str, Column], group_size: int) -> dict[str, float]:
    """Each part's share of the variance of the parts' sum within groups; they sum to 1.

    Negative where a part goes against the sum; all 0 where the sum does not vary.
    """
    centred = {name: _centred(column, group_size) for name, column in parts.items()}
    total = [sum(row) for row in zip(*centred.values(), strict=True)]
    variance = sum(x * x for x in total)
    if not variance:
        return dict.fromkeys(parts, 0.0)
    return {
        name: sum(x * y for x, y in zip(column, total, strict=True)) / variance
        for name, column in centred.items()
    }


def correlations(parts: Mapping[str, Column], group_size: int) -> dict[tuple[str, str], float]:
    """Of each pair within groups, where both vary."""
    centred = {name: _centred(column, group_size) for name, column in parts.items()}
    sizes = {name: math.sqrt(sum(x * x for x in column)) for name, column in centred.items()}
    names = [name for name in parts if sizes[name]]
    return {
        (one, other): sum(x * y for x, y in zip(centred[one], centred[other], strict=True))
        / (sizes[one] * sizes[other])
        for i, one in enumerate(names)
        for other in names[i + 1 :]
    }


def _centred(column: Column, group_size: int) -> list[float]:
    """Less the mean of its group, or of the batch where groups are of one; missing is 0."""
    size = group_size if group_size > 1 else len(column)
    result: list[float] = []
    for start in range(0, len(column), size):
        group = column[start : start + size]
        mean = _mean(group, 0.0)
        result += [0.0 if x is None else x - mean for x in group]
    return result


class Watch:
    """Warns, once each, of what WATCHED batches in a row have shown."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"seen": {}, "said": []}

    def see(self, parts: Mapping[str, Column], raw: Mapping[str, Column], group_size: int) -> None:
        seen: dict[str, float] = {}
        for name, column in raw.items() if len(raw) > 1 else ():  # one alone is seen in the sum
            known = [x for x in column if x is not None]
            if known and max(known) == min(known):
                seen[f"reward {name!r} is saturated: it gives all completions the same score"] = 1.0
        if len(parts) > 1:
            for name, share in shares(parts, group_size).items():
                if share > DOMINATES:
                    seen[
                        f"reward {name!r} dominates: it makes {share:.0%} of the advantages' "
                        "variance; NORMALIZE or a smaller WEIGHT would let the others count"
                    ] = share
            for (one, other), value in correlations(parts, group_size).items():
                if value < CONFLICTS:
                    seen[
                        f"rewards {one!r} and {other!r} conflict: their correlation is {value:.2f}"
                    ] = value
        # By what is said up to its first colon: the figures after it change.
        kinds = {text.split(":")[0]: text for text in seen}
        counts = {kind: self.state["seen"].get(kind, 0) + 1 for kind in kinds}
        self.state["seen"] = counts
        for kind, count in counts.items():
            if count >= WATCHED and kind not in self.state["said"]:
                self.state["said"].append(kind)
                log.warning("%s (%d steps in a row)", kinds[kind], WATCHED)
