"""Curves as SVG paths, thinned to what the eye sees; the pages draw them (pages/pieces.html).

Text of axes is HTML beside the SVG, so that it keeps its size on a phone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from adaptiverl.commands.curves import smoothed

WIDTH, HEIGHT = 1000, 300  # of the viewBox, which is stretched to the figure
POINTS = 200  # of a curve, at most
COLORS = 6  # classes s0 … s5 of style.css
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line: `raw` is drawn faintly behind it, `band` around it."""

    name: str
    color: int
    path: str
    raw: str = ""
    band: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure; ticks are (percent from the left or the top, text)."""

    title: str
    unit: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    summary: str  # for who does not see it
    note: str
    hover: dict[str, Any]  # x, and y by the name of each curve, as page.js reads them


@dataclass(frozen=True)
class Series:
    """(x, y) of one curve, and optionally how far it spreads to each side."""

    name: str
    points: Points
    spread: Sequence[float] | None = None
    dashed: bool = False
    smooth: bool = True


def chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    log: bool = False,
    note: str = "",
    x_name: str = "step",
) -> Chart | None:
    """None where no series has a point."""
    series = [
        replace(each, points=known)
        for each in series
        if (known := [(x, y) for x, y in each.points if math.isfinite(y) and (y > 0 or not log)])
    ]
    if not series:
        return None
    drawn = [_drawn(each, log) for each in series]
    pairs = list(zip(series, drawn, strict=True))
    x_axis = _Axis.of([x for each in series for x, _ in each.points], WIDTH, False)
    y_axis = _Axis.of([y for _, *columns in drawn for ys in columns for y in ys], HEIGHT, log)
    curves = [
        Curve(
            own.name,
            place % COLORS,
            _path(at.x, at.y, x_axis, y_axis),
            _path(at.x, at.raw, x_axis, y_axis) if at.raw else "",
            _band(at, x_axis, y_axis) if at.low and len(at.x) > 1 else "",
            own.dashed,
        )
        for place, (own, at) in enumerate(pairs)
    ]
    values = [
        {"name": own.name, "x": [*map(rounded, at.x)], "y": [*map(rounded, at.y)]}
        for own, at in pairs
    ]
    hover = {"title": title, "x": [x_axis.low, x_axis.high], "xName": x_name, "curves": values}
    summary = f"{title}{f', {unit}' if unit else ''}. " + " ".join(
        _summary(each, x_name) for each in series
    )
    x_ticks = [(100 * x_axis.place(tick) / WIDTH, number(tick)) for tick in x_axis.ticks()]
    y_ticks = [(100 - 100 * y_axis.place(tick) / HEIGHT, number(tick)) for tick in y_axis.ticks()]
    return Chart(title, unit, curves, x_ticks, y_ticks, summary, note, hover)


def number(value: float | None, digits: int = 3) -> str:
    """Short, for people."""
    if value is None:
        return "missing"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
        return text.replace("-", "−")
    return (
        f"{value:.{max(digits - 1, 1)}g}".replace("-", "−").replace("e+0", "e").replace("e−0", "e−")
    )


def rounded(value: float) -> float:
    """To the digits that are seen, so that a page stays small."""
    return float(f"{value:.4g}")


class _Drawn(NamedTuple):
    """Columns of one curve; the last three are empty where nothing of the kind is drawn."""

    x: list[float]
    y: list[float]
    raw: list[float]
    low: list[float]
    high: list[float]


def _drawn(series: Series, log: bool) -> _Drawn:
    """Smoothed and thinned: each point stands for a bucket of neighbours."""
    values = [math.log(y) if log else y for _, y in series.points]
    smooth = smoothed(values) if series.smooth and len(values) >= 10 else values
    size = math.ceil(len(values) / POINTS)
    buckets = [slice(k, k + size) for k in range(0, len(values), size)]

    def means(column: Sequence[float]) -> list[float]:
        found = [sum(column[part]) / len(column[part]) for part in buckets]
        return [math.exp(value) for value in found] if log else found

    x = [x for x, _ in series.points]
    places = [sum(x[part]) / len(x[part]) for part in buckets]
    low, high, raw = [], [], []
    if series.spread is not None:
        around = smoothed(list(series.spread))
        low = means([a - b for a, b in zip(smooth, around, strict=True)])
        high = means([a + b for a, b in zip(smooth, around, strict=True)])
    if smooth is not values and size == 1:
        raw = means(values)
    elif smooth is not values and not low:  # what the buckets hide
        low, high = ([end(values[part]) for part in buckets] for end in (min, max))
        if log:
            low, high = [math.exp(v) for v in low], [math.exp(v) for v in high]
    return _Drawn(places, means(smooth), raw, low, high)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    size: int
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], size: int, log: bool) -> "_Axis":
        low, high = min(values), max(values)
        if log:
            return cls(low / 1.15, high * 1.15, size, log)
        if size == HEIGHT:
            if low == high == 0:  # of a share, say, which is never below
                return cls(0.0, 1.0, size, log)
            margin = (high - low) * 0.06 or abs(high) * 0.1
            return cls(low - margin, high + margin, size, log)
        return cls(low, high if high > low else low + 1, size, log)

    def place(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = math.log(value) if self.log else value
        return self.size * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers, five or so."""
        if self.log and self.high / self.low > 8:
            decades = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            every = max(1, math.ceil(len(decades) / 4))
            return [10.0**power for power in decades][::every]
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
        if self.size == WIDTH:  # steps are whole
            step = max(step, 1.0) if self.high - self.low >= 3 else step
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) for k in range(first, last + 1)]


def _path(x: Sequence[float], y: Sequence[float], x_axis: _Axis, y_axis: _Axis) -> str:
    places = [
        f"{x_axis.place(a):.0f} {HEIGHT - y_axis.place(b):.0f}" for a, b in zip(x, y, strict=True)
    ]
    if len(places) == 1:  # a point is a short dash
        return f"M{places[0]}h8"
    return "M" + "L".join(places)


def _band(at: _Drawn, x_axis: _Axis, y_axis: _Axis) -> str:
    there = _path(at.x, at.high, x_axis, y_axis)
    back = _path(at.x[::-1], at.low[::-1], x_axis, y_axis)
    return f"{there}L{back[1:]}Z"


def _summary(series: Series, x_name: str) -> str:
    (_, first), (end, last) = series.points[0], series.points[-1]
    low, at_low = min((y, x) for x, y in series.points)
    high, at_high = max((y, x) for x, y in series.points)
    return (
        f"{series.name}: {number(first)} at first, {number(last)} at {x_name} {number(end)}; "
        f"lowest {number(low)} ({x_name} {number(at_low)}), "
        f"highest {number(high)} ({x_name} {number(at_high)})."
    )
