"""The line search of the trust region: how much of an update keeps its KL within bounds.

Knows neither optimizer nor rate: it is given how to measure and how to scale. Imports no torch.
"""

import math
from collections.abc import Callable

KL_TOLERANCE = 2.0  # an update whose KL is this many times the target is scaled down
MAX_RESCALE = 30.0  # the largest change between two measurements: KL ≈ s² holds for small changes
MAX_MEASUREMENTS = 12
LOST = 0.5  # the factor on the rate where the KL of an update was never finite


def search(
    measure_kl: Callable[[], float],
    rescale: Callable[[float], None],
    target: float,
    max_scale: float = math.inf,
    upwards: bool = False,
) -> tuple[float, float, bool]:
    """The factor of the update, at most `max_scale`, its KL, and whether any KL was finite.

    `rescale(s)` multiplies the update by s. An update that falls short is scaled up if `upwards`.
    The search keeps the largest scale within bounds and the smallest one beyond, and bisects where
    the quadratic law leads out of that bracket: the KL of a mixture of experts jumps. Where no
    scale is within bounds, the update is taken back: rescale(0), and a KL of 0. Where a KL stays
    exactly the same while the update is scaled up, the factor is 1.
    """
    scale, first = 1.0, measure_kl()
    kl = first
    within, kl_within, beyond, known = 0.0, 0.0, math.inf, math.isfinite(kl)
    for _ in range(MAX_MEASUREMENTS):
        far = _is_far(kl, target)
        short = upwards and is_short(kl, target, max_scale / scale)
        if far:
            beyond = scale
        else:
            within, kl_within = scale, kl
        if not far and not short:
            break
        # Of an infinite or undefined KL it is known only that the step was too large.
        ratio = 0.0 if math.isnan(kl) else target / kl if kl > 0 else math.inf
        change = min(max(math.sqrt(ratio), 1 / MAX_RESCALE), MAX_RESCALE, max_scale / scale)
        if within and not within < scale * change < beyond:
            change = math.sqrt(within * beyond) / scale
        rescale(change)
        scale, kl = scale * change, measure_kl()
        known |= math.isfinite(kl)
    if _is_far(kl, target):
        rescale(within / scale)
        scale, kl = within or (scale if known else LOST), kl_within
    elif scale > 1 and kl == first and beyond == math.inf:
        rescale(1 / scale)
        scale = 1.0
    return scale, kl, known


def is_short(kl: float, target: float, room: float) -> bool:
    """Whether the KL is too small, and an update may be `room` times as large."""
    return kl < target / KL_TOLERANCE and room > 1


def _is_far(kl: float, target: float) -> bool:
    """Also where it is NaN."""
    return not -math.inf < kl <= KL_TOLERANCE * target
