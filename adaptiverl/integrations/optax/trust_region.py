"""The trust region as an optax transformation: adaptiverl.optim.trust_region, pure and jit-able."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptiverl.integrations.optax.line_search import is_short, line_search
from adaptiverl.optim.constants import lr_bounds
from adaptiverl.optim.hyperparams import check_rate, numbers
from adaptiverl.optim.signals import SignalToNoise
from adaptiverl.optim.trust_region import (
    EVIDENCE_SCALE,
    MIN_CONFIDENCE,
    ROUNDING,
    TRUSTED,
    check_steps,
    default_kl,
)


class TrustRegionState(NamedTuple):
    """What TrustRegion.state_dict() has, and what the last step did."""

    ratio: Any = 1.0  # the factor on the rate
    time: Any = 0  # steps that have been made
    initialized: Any = False  # whether the KL of an update has met the target before
    informative_steps: Any = 0
    weight: Any = 0.0  # of the alignments, as in SignalToNoise
    weight2: Any = 0.0
    mean: Any = 0.0
    spread: Any = 0.0
    last: Any = None  # the direction of the last update
    lr: Any = 0.0  # the rate that the last step took, after the line search
    kl: Any = math.nan  # of the last update, nats per token; NaN where it was not measured
    target: Any = 0.0  # nats per token
    scale: Any = 1.0  # the factor of the line search; 0: nothing is left of the step


def trust_region(
    learning_rate: float | Callable[[Any], Any],
    *,
    kl: float | None = None,
    steps: int | None = None,
    min_lr: float | None = None,
    max_lr: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by −rate such that each one's KL meets a target; the last of a chain.

        optimizer = optax.chain(optax.scale_by_adam(), trust_region(1.0, steps=1000))
        updates, state = optimizer.update(grads, state, params, measure_kl=measure_kl, grad=grads)

    learning_rate   where the rate starts, or a schedule of it; it stands for optax's
                    scale_by_learning_rate, which the chain must not have too
    kl, steps, min_lr, max_lr       as of adaptiverl.TrustRegion

    The arguments of `update` beside those of optax:

    measure_kl(params)      gives KL(policy of `params` before the step ‖ policy of its argument) in
                    nats per token, in jax: it is traced into a loop, and called up to 13 times
    grad            the gradient before the chain, of fresh samples: how it agrees with the last
                    update is the evidence that narrows the region. None: the region stays whole,
                    as with adaptiverl.TrustRegion for optimizers without momentum
    informative     whether rewards differ, within some prompt; default True
    min_kl          lowest target; default 0

    A gradient or an update that is not finite, or whose square is not, is no step: parameters,
    rate and this state stay, and `scale` is 0. It cannot undo what the gradient has made of the
    transformations before it in the chain: optax.apply_if_finite(chain, …) keeps their state.

    Where a chain has decoupled weight decay, the last update includes it; torch's does not.
    """
    check_steps(steps)
    given = {} if callable(learning_rate) else numbers(learning_rate=learning_rate)
    if not callable(learning_rate) and not given.get("learning_rate"):
        raise ValueError(
            f"learning_rate is {learning_rate}; it must be a number above 0, or a schedule"
        )
    largest = default_kl(steps) if kl is None else kl
    if not 0 < largest < math.inf:
        raise ValueError(f"kl is {kl}; it must be in (0, inf): nats per token of an update")
    low, high = lr_bounds(min_lr, max_lr)
    if not 0 <= low <= high:
        raise ValueError(f"min_lr {low:g} is above max_lr {high:g}")
    for rate in given.values():
        check_rate(rate, (low, high))

    def init(params: Any) -> TrustRegionState:
        first = TrustRegionState(last=jax.tree.map(jnp.zeros_like, params))
        return jax.tree.map(jnp.asarray, first)

    def update(
        updates: Any,
        state: TrustRegionState,
        params: Any = None,
        *,
        measure_kl: Callable[[Any], Any],
        grad: Any = None,
        informative: Any = True,
        min_kl: Any = 0.0,
        **_: Any,
    ) -> tuple[Any, TrustRegionState]:
        if params is None:
            raise ValueError("trust_region measures the KL of new parameters: give update params")
        given = learning_rate(state.time) if callable(learning_rate) else learning_rate
        base = jnp.asarray(given, state.ratio.dtype)
        rate = jnp.where(base > 0, jnp.clip(base * state.ratio, low, high), 0.0)
        moves = _any(updates if grad is None else grad)
        finite = _finite(updates) & (True if grad is None else _finite(grad))
        active = (base > 0) & (state.initialized | moves) & finite
        seen = state
        if grad is not None:
            seen = _observe(state, optax.tree.vdot(state.last, grad), grad, active & informative)
        left = 1.0 if steps is None else jnp.maximum(steps - state.time, 1) / steps
        target = jnp.maximum(largest * left * confidence(seen), min_kl)

        def at(scale: Any) -> Any:
            step = jax.tree.map(lambda u: -rate * scale * u, updates)
            return measure_kl(optax.apply_updates(params, step))

        one, unknown = jnp.ones_like(rate), jnp.full_like(rate, jnp.nan)
        scale, applied, found = jax.lax.cond(
            active,
            lambda: line_search(at, target, state.initialized, high / rate),
            lambda: (one, one, unknown),
        )
        bounds = low / base, high / base
        ratio = jnp.clip(state.ratio * scale, *bounds)
        factor = jnp.where(found > 0, jnp.clip((target / found) ** 0.25, 0.5, 2.0), 2.0)
        none = found < -jnp.maximum(ROUNDING[0] * target, ROUNDING[1])  # no KL, no information
        unmoved = ~state.initialized & (scale == 1) & is_short(found, target, high / rate)
        # That nothing is left of an update says nothing about the rate
        kept = active & (applied > 0) & ~none & ~unmoved
        lost = jnp.where(active, jnp.isnan(found), ~finite)  # the step is left out
        ratio = jnp.where(kept, jnp.clip(ratio * factor, *bounds), ratio)
        new = seen._replace(
            ratio=jnp.where(active, ratio, state.ratio),
            time=state.time + 1,
            initialized=state.initialized | kept,
            last=jax.tree.map(lambda u, old: jnp.where(finite, u, old), updates, state.last),
            lr=jnp.where(lost, rate, rate * scale),
            kl=found,
            target=target,
            scale=jnp.where(lost, 0.0, scale),
        )
        new = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), new, state)
        # Times 0 a number that is not finite is none
        return jax.tree.map(
            lambda u: jnp.where(lost, jnp.zeros_like(u), -rate * applied * u), updates
        ), new

    return optax.GradientTransformationExtraArgs(init, update)


def confidence(state: TrustRegionState) -> Any:
    """The share of the target that the signal-to-noise ratio of the alignments allows."""
    variance = state.spread / state.weight * state.weight2 / state.weight**2
    value = jnp.where((state.weight > 4) & (state.spread > 0), state.mean / jnp.sqrt(variance), 0.0)
    share = jnp.clip(value / EVIDENCE_SCALE, MIN_CONFIDENCE, 1.0)
    return jnp.where(state.informative_steps < TRUSTED, 1.0, share)


def _observe(state: TrustRegionState, both: Any, grad: Any, informative: Any) -> TrustRegionState:
    """Takes in the cosine of the last update and `grad`, whose product is `both`."""
    size = optax.tree.norm(state.last) * optax.tree.norm(grad)
    cosine = both / size
    known = informative & (size > 0) & jnp.isfinite(cosine)
    evidence = SignalToNoise(state.weight, state.weight2, state.mean, state.spread)
    evidence.observe(cosine)  # also of traced numbers
    new = state._replace(informative_steps=state.informative_steps + 1, **vars(evidence))
    return jax.tree.map(lambda a, b: jnp.where(known, a, b), new, state)


def _finite(tree: Any) -> Any:
    """Whether the sum of all squares is finite, as torch's trust region asks."""
    return jnp.isfinite(optax.tree.norm(tree, squared=True))


def _any(tree: Any) -> Any:
    return jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(tree)]).any()
