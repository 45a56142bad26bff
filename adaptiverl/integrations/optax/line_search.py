"""The line search of the trust region in jax: TrustRegion.line_search as a pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adaptiverl.optim.line_search import KL_TOLERANCE, LOST, MAX_MEASUREMENTS, MAX_RESCALE
from adaptiverl.optim.trust_region import ROUNDING


def line_search(
    measure_kl: Callable[[Any], Any],
    target: Any,
    initialized: Any = False,
    max_scale: Any = jnp.inf,
) -> tuple[Any, Any, Any]:
    """TrustRegion.line_search: the factor on the rate, the one on the update, and its KL.

    measure_kl(s)   gives the KL of the update times s, in jax
    initialized     whether an update has met the target before; the first is also scaled up
    max_scale       largest factor

    The factor on the update is 0 where no scale brings it within bounds, and else that on the rate.
    Where the KL is never finite it is NaN, and the factor on the rate is LOST.
    """

    def is_far(kl: Any) -> Any:
        return ~((kl > -jnp.inf) & (kl <= KL_TOLERANCE * target))  # also NaN

    def body(search: tuple[Any, ...]) -> tuple[Any, ...]:
        count, scale, kl, within, kl_within, beyond, known, _ = search
        far = is_far(kl)
        short = jnp.logical_not(initialized) & is_short(kl, target, max_scale / scale)
        beyond = jnp.where(far, scale, beyond)
        within, kl_within = jnp.where(far, within, scale), jnp.where(far, kl_within, kl)
        ratio = jnp.where(jnp.isnan(kl), 0.0, jnp.where(kl > 0, target / kl, jnp.inf))
        change = jnp.clip(jnp.sqrt(ratio), 1 / MAX_RESCALE, MAX_RESCALE)
        change = jnp.minimum(change, max_scale / scale)
        outside = (within > 0) & ~((within < scale * change) & (scale * change < beyond))
        change = jnp.where(outside, jnp.sqrt(within * beyond) / scale, change)
        more = far | short
        scale = jnp.where(more, scale * change, scale)
        kl = jax.lax.cond(more, lambda: _like(measure_kl(scale), kl), lambda: kl)
        return count + 1, scale, kl, within, kl_within, beyond, known | jnp.isfinite(kl), more

    one = jnp.ones_like(jnp.asarray(target, float))
    first = _like(measure_kl(one), one)
    none, yes = 0 * one, jnp.asarray(True)
    search = (0, one, first, none, none, jnp.inf * one, jnp.isfinite(first), yes)
    search = jax.lax.while_loop(lambda s: (s[0] < MAX_MEASUREMENTS) & s[-1], body, search)
    _, scale, kl, within, kl_within, beyond, known, _ = search
    failed = is_far(kl)
    applied, kl = jnp.where(failed, within, scale), jnp.where(failed, kl_within, kl)
    on_rate = jnp.where(failed & (within > 0), within, jnp.where(known, scale, LOST))
    # A KL below 0 says nothing, nor does one that is the same at every scale
    vain = kl < -jnp.maximum(ROUNDING[0] * target, ROUNDING[1])
    vain = (vain | ((kl == first) & (beyond == jnp.inf) & jnp.logical_not(failed))) & (on_rate > 1)
    on_rate, applied = jnp.where(vain, 1.0, on_rate), jnp.where(vain, 1.0, applied)
    return on_rate, applied, jnp.where(known, kl, jnp.nan)


def is_short(kl: Any, target: Any, room: Any) -> Any:
    """Whether the KL is too small, and an update may be `room` times as large."""
    return (kl < target / KL_TOLERANCE) & (room > 1)


def _like(value: Any, other: Any) -> Any:
    return jnp.asarray(value, other.dtype)
