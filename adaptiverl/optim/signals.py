"""What rules see: a number after each step, and what its past says of it.

Each part is a pure function (state, x) → (state, answer) on plain numbers and lists. A signal that
is only noise has no trend, no excess and no plateau worth acting on, or rarely; what it costs to be
wrong is bounded in controller.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Reading:
    """One observation of a signal, beside its past."""

    value: float
    ema: float  # smoothed, from the first value on
    usual: float  # the mean of |smoothed| values so far
    trend: int = 0  # 1 rising, -1 falling, 0 no more than noise
    variance: float = 0.0  # of the smoothed values in the window
    excess: float = 0.0  # by how much the window's variance exceeds its long-run mean, at least 0
    plateau: int = 0  # 1: nothing has improved, drop; -1: the drop brought nothing, undo
    warm: bool = True  # whether the smoothed value has forgotten its first


@dataclass(frozen=True)
class Signal:
    """How a signal is read. Its state is a dict of numbers and lists that `read` returns anew."""

    beta: float = 0.9  # of the EMA
    window: int = 20  # values whose variance is taken
    trend_window: int | None = None  # values that a trend is tested on; None: 2 / (1 - beta)
    threshold: float = 3.0  # standard errors that a trend must stand out by
    min_rel: float = 1e-4  # and its least size, relative to the mean
    patience: int = 20
    cooldown: int = 50

    @property
    def tested(self) -> int:
        """As many values as the smoothed one remembers; of beta 0 two: neighbours, as the seeds."""
        return self.trend_window or max(round(2 / (1 - self.beta)), 2)

    def read(self, state: dict[str, Any], x: float) -> tuple[dict[str, Any], Reading]:
        n = state.get("n", 0) + 1
        ema = x if n == 1 else self.beta * state["ema"] + (1 - self.beta) * x
        usual = abs(ema) if n == 1 else state["usual"] + (abs(ema) - state["usual"]) / n
        values = [*state.get("values", []), x][-self.window :]
        smoothed = [*state.get("smoothed", []), ema][-self.window :]
        long, above = excess(state.get("long"), values, self.window)
        tested, direction = trend(
            state.get("tested", []), x, self.tested, self.threshold, self.min_rel
        )
        waiting, move = plateau(state.get("waiting", {}), x, self.patience, self.cooldown)
        reading = Reading(
            value=x,
            ema=ema,
            usual=state.get("usual", usual),
            trend=direction,
            variance=variance(smoothed),
            excess=above,
            plateau=move,
            warm=n * (1 - self.beta) >= 2 or self.beta == 0,
        )
        state = {"n": n, "ema": ema, "usual": usual, "values": values, "smoothed": smoothed}
        return state | {"long": long, "tested": tested, "waiting": waiting}, reading


def variance(values: Sequence[float]) -> float:
    """The unbiased sample variance; 0 of fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / (len(values) - 1)


def excess(long: float | None, values: Sequence[float], window: int) -> tuple[float | None, float]:
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
        return {"values": []}, 0 if _fall(before, values) > 4 else -1
    values = values[-2 * patience :]
    if len(values) < 2 * patience:
        return {"values": values}, 0
    _, slope, spread, residuals = _line(values)
    if _over(-slope, math.sqrt(_noise(residuals) / spread)) > 1:
        return {"values": values}, 0
    return {"values": [], "before": values}, 1


def _fall(before: Sequence[float], after: Sequence[float]) -> float:
    """By how many standard errors `after` lies below the line through `before`, at its middle."""
    (mean, slope, spread, one), (found, _, _, other) = _line(before), _line(after)
    distance = (len(before) + len(after)) / 2
    variance = max(_noise(one), _noise(other))
    share = 1 / len(before) + 1 / len(after) + distance**2 / spread
    return _over(mean + slope * distance - found, math.sqrt(variance * share))


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
    alike = sum(a * b for a, b in pairwise(residuals)) / total
    alike = min(max(alike, 0.0), 0.95)
    return total / (n - 2) * (1 + alike) / (1 - alike)


def _over(difference: float, error: float) -> float:
    """In standard errors, of which there may be none."""
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0
