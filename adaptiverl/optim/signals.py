"""What rules read: a number after each step, and what its past says about it. Imports no torch.

Each part is a pure function (state, x) → (state, answer) on plain numbers and lists, but for
SignalToNoise, which the trust region keeps. A signal that
is only noise has no trend, no excess variance and no plateau that is worth acting on, or rarely;
controller.py bounds what it costs to be wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LARGEST = 1e150  # a signal may be: sums of squares of larger ones are no numbers
State = dict[str, Any]  # plain numbers and lists
MEMORY = 0.96  # of SignalToNoise, per step: a mean over some 25 of them


@dataclass(frozen=True)
class Reading:
    """One observation of a signal, beside its past."""

    value: float
    ema: float  # smoothed, from the first value on
    mean_abs: float  # the mean of |smoothed| values so far, without this one
    trend: int  # 1 rising, -1 falling, 0 no more than noise
    variance: float  # of the smoothed values in the window
    excess_variance: float  # of the window over its long-run mean, relative to it; at least 0
    plateau: int  # 1: nothing has improved, drop; -1: the drop brought nothing, undo
    warm: bool  # whether the smoothed value has forgotten its first


def read(state: State, x: float, beta: float, c: Any) -> tuple[State, Reading]:
    """Takes in the value `x`; `beta` smooths it, and `c` has the constants of that name."""
    averages = smoothed(state, x, beta)
    values = [*state.get("values", []), x][-c.var_window :]
    emas = [*state.get("emas", []), averages["ema"]][-c.var_window :]
    long, excess = excess_variance(state.get("long"), values, c.var_window)
    # As many values as the EMA remembers; two neighbours for a beta of 0
    window = c.trend_window or max(round(2 / (1 - beta)), 2)
    tested, direction = trend(
        state.get("tested", []), x, window, c.trend_threshold, c.min_rel_improve
    )
    waiting, move = plateau(state.get("waiting", {}), x, c.patience, c.cooldown)
    reading = Reading(
        value=x,
        ema=averages["ema"],
        mean_abs=state["mean_abs"] if state else averages["mean_abs"],
        trend=direction,
        variance=variance(emas),
        excess_variance=excess,
        plateau=move,
        warm=averages["n"] * (1 - beta) >= 2 or beta == 0,
    )
    past = {"values": values, "emas": emas, "long": long, "tested": tested, "waiting": waiting}
    return averages | past, reading


def smoothed(state: State, x: float, beta: float) -> State:
    """The count of values, their exponential mean, and the mean of its absolute values."""
    n = state.get("n", 0) + 1
    ema = x if n == 1 else beta * state["ema"] + (1 - beta) * x
    mean_abs = abs(ema) if n == 1 else state["mean_abs"] + (abs(ema) - state["mean_abs"]) / n
    return {"n": n, "ema": ema, "mean_abs": mean_abs}


def variance(values: Sequence[float]) -> float:
    """The unbiased sample variance; 0 of fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / (len(values) - 1)


def excess_variance(
    long: float | None, values: Sequence[float], window: int
) -> tuple[float | None, float]:
    """How far the variance of a full window lies above its own running mean, in units of that.

    Relative, because Var(ℓ) itself depends on the loss's units.
    """
    if len(values) < window:
        return long, 0.0
    now = variance(values)
    if not long:
        return now, 0.0
    return long + 0.01 * (now - long), max(0.0, now / long - 1)


def trend(
    values: Sequence[float], x: float, window: int, threshold: float, min_rel: float
) -> tuple[list[float], int]:
    """1 or -1 where the slope over `window` values stands out by `threshold` standard errors.

    After an answer the test begins anew from x, so no value is evidence twice.
    """
    values = [*values, x][-window:]
    if len(values) < window:
        return values, 0
    n, (mean, slope, spread, residuals) = len(values), _line(values)
    left = sum(r**2 for r in residuals)
    error = math.sqrt(left / (n - 2) / spread) if n > 2 else 0.0
    large = abs(slope) * (n - 1) > min_rel * abs(mean)
    if not large or abs(slope) <= threshold * error:
        return values, 0
    return [x], 1 if slope > 0 else -1


def plateau(
    state: dict[str, Any], x: float, patience: int, cooldown: int
) -> tuple[dict[str, Any], int]:
    """1 where the last 2 · `patience` values do not fall; -1 to take that back.

    They fall where their slope is below 0 by more than its standard error. After a drop `cooldown`
    values are awaited: unless their mean is four standard errors below where the line through
    those before the drop leads, the rate was not what held them up. So neither noise, nor values
    that depend on each other, nor a steady fall leave a lasting mark.
    """
    values, before = [*state.get("values", []), x], state.get("before")
    if before:
        if len(values) < cooldown:
            return {"values": values, "before": before}, 0
        return {"values": []}, 0 if _fell(before, values) else -1
    values = values[-2 * patience :]
    if len(values) < 2 * patience:
        return {"values": values}, 0
    _, slope, spread, residuals = _line(values)
    if -slope > math.sqrt(_noise(residuals) / spread):
        return {"values": values}, 0
    return {"values": [], "before": values}, 1


def _fell(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether `after` is four standard errors below the line through `before`, at its middle."""
    (mean, slope, spread, one), (found, _, _, other) = _line(before), _line(after)
    distance = (len(before) + len(after)) / 2
    share = 1 / len(before) + 1 / len(after) + distance**2 / spread
    error = math.sqrt(max(_noise(one), _noise(other)) * share)
    return mean + slope * distance - found > 4 * error


def _line(values: Sequence[float]) -> tuple[float, float, float, list[float]]:
    """Mean, slope, Σ (place − middle)² and residuals of the least-squares line."""
    n, mean, middle = len(values), sum(values) / len(values), (len(values) - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(n))
    slope = sum((i - middle) * (y - mean) for i, y in enumerate(values)) / spread if spread else 0.0
    return mean, slope, spread, [y - mean - slope * (i - middle) for i, y in enumerate(values)]


def _noise(residuals: Sequence[float]) -> float:
    """Their variance, as if they were independent: larger where neighbours are alike."""
    n, total = len(residuals), sum(r**2 for r in residuals)
    if n <= 2 or not total:
        return 0.0
    alike = min(max(sum(a * b for a, b in pairwise(residuals)) / total, 0.0), 0.95)
    return total / (n - 2) * (1 + alike) / (1 - alike)


@dataclass
class SignalToNoise:
    """Mean of a signal in units of its standard error, with exponential weights (MEMORY)."""

    weight: float = 0.0
    weight2: float = 0.0  # sum of squared weights
    mean: float = 0.0
    spread: float = 0.0  # weighted sum of squared deviations

    def observe(self, x: float) -> None:
        self.weight = MEMORY * self.weight + 1
        self.weight2 = MEMORY**2 * self.weight2 + 1
        off = x - self.mean
        self.mean += off / self.weight
        self.spread = MEMORY * self.spread + off * (x - self.mean)

    @property
    def value(self) -> float:
        """0 while there are fewer than some five values."""
        if self.weight <= 4 or not self.spread > 0:
            return 0.0
        variance = self.spread / self.weight * self.weight2 / self.weight**2
        return self.mean / math.sqrt(variance)
