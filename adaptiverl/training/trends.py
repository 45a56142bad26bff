"""Trends in short series of noisy figures: functions without state."""

import math
from collections.abc import Sequence

SIGNIFICANT = 4.0  # standard errors; every step asks, so two would be found by chance
LEAST = 20  # values; fewer show no trend
OF_EVALUATIONS = 6  # values, each a mean over all evaluated prompts


def trend(values: Sequence[float]) -> float:
    """The least-squares slope in units of its standard error; 0 where there is none to be had."""
    n = len(values)
    if n < 3:
        return 0.0
    middle, mean = (n - 1) / 2, sum(values) / n
    spread = sum((k - middle) ** 2 for k in range(n))
    slope = sum((k - middle) * (value - mean) for k, value in enumerate(values)) / spread
    rest = sum((value - mean - slope * (k - middle)) ** 2 for k, value in enumerate(values))
    error = math.sqrt(rest / (n - 2) / spread)
    if error <= 1e-12 * abs(slope):  # a line without noise
        return math.copysign(math.inf, slope) if slope else 0.0
    return slope / error


def parted(rising: Sequence[float], falling: Sequence[float], least: int = LEAST) -> bool:
    """Whether one series rises and the other falls, each beyond SIGNIFICANT standard errors."""
    if min(len(rising), len(falling)) < least:
        return False
    return trend(rising) > SIGNIFICANT and trend(falling) < -SIGNIFICANT
