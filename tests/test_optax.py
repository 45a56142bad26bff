"""The optax port walks as the torch library does: the same rates, KL and weights, to 1e-6."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from adaptiverl import AdaptiveOptimizer
from adaptiverl.optim.trust_region import TrustRegion

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy

from adaptiverl.integrations.optax import adaptive, confidence, line_search, trust_region  # noqa: E402

STEPS, ROWS, INPUTS, CLASSES = 40, 8, 6, 5


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def problem(noise: float):
    """A policy of logits X·W, and an advantage for each step, row and class."""
    numbers = np.random.RandomState(0)
    x = numbers.randn(ROWS, INPUTS)
    useful = numbers.randn(ROWS, CLASSES)
    advantages = useful + noise * numbers.randn(STEPS, ROWS, CLASSES)
    advantages[:2] = 0  # no gradient at first
    return x, 0.1 * numbers.randn(INPUTS, CLASSES), advantages


TORCH = {
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
}
OPTAX = {
    "adamw": optax.scale_by_adam,
    "momentum": lambda: optax.trace(0.9),
    "sgd": optax.identity,
}


def with_torch(kind, lr, noise, informative, min_kl, **arguments):
    x, start, advantages = problem(noise)
    x, w = torch.tensor(x), torch.tensor(start, requires_grad=True)
    optimizer = TORCH[kind]([w], lr)
    region = TrustRegion(optimizer, **arguments)
    trace = []
    for step in range(STEPS):
        optimizer.zero_grad()
        (-(torch.tensor(advantages[step]) * F.log_softmax(x @ w, -1)).mean()).backward()
        before = F.log_softmax(x @ w, -1).detach()

        def measure_kl(before=before) -> float:
            now = F.log_softmax(x @ w, -1).detach()
            return (before.exp() * (before - now)).sum(-1).mean().item()

        info = region.step(measure_kl, min_kl=min_kl, informative=informative(step))
        kl = math.nan if info.kl is None else info.kl
        trace.append([info.lr, kl, info.target, info.scale, region.ratio, region.confidence])
    return np.array(trace), w.detach().numpy()


def with_optax(kind, lr, noise, informative, min_kl, **arguments):
    x, start, advantages = problem(noise)
    x, w = jnp.asarray(x), {"w": jnp.asarray(start)}
    optimizer = optax.chain(OPTAX[kind](), trust_region(lr, **arguments))

    def logprobs(w):
        return jax.nn.log_softmax(x @ w["w"], -1)

    @jax.jit
    def step(w, state, advantage, informative):
        grad = jax.grad(lambda w: -(advantage * logprobs(w)).mean())(w)
        before = logprobs(w)

        def measure_kl(new):
            return (jnp.exp(before) * (before - logprobs(new))).sum(-1).mean()

        updates, state = optimizer.update(
            grad, state, w, measure_kl=measure_kl, grad=None if kind == "sgd" else grad,
            informative=informative, min_kl=min_kl,
        )  # fmt: skip
        return optax.apply_updates(w, updates), state

    state, trace = optimizer.init(w), []
    for i in range(STEPS):
        w, state = step(w, state, advantages[i], informative(i))
        own = state[-1]
        trace.append([own.lr, own.kl, own.target, own.scale, own.ratio, confidence(own)])
    return np.array(trace, dtype=float), np.asarray(w["w"])


@pytest.mark.parametrize(
    ("kind", "lr", "noise", "arguments"),
    [
        ("adamw", 1e-7, 0.5, {"steps": STEPS}),
        ("adamw", 1.0, 5.0, {}),
        ("momentum", 10.0, 0.5, {"steps": STEPS, "kl": 0.1}),
        ("momentum", 1e-3, 5.0, {"max_lr": 0.5}),
        ("sgd", 0.5, 1.0, {"steps": STEPS, "min_lr": 0.3}),
    ],
)
def test_the_trust_region_walks_as_torchs_does(kind, lr, noise, arguments):
    calls = kind, lr, noise, lambda step: step % 5 != 4, 1e-4
    expected, weights = with_torch(*calls, **arguments)
    found, own = with_optax(*calls, **arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(own, weights, rtol=1e-6)
    assert np.isnan(expected[:2, 1]).all() and not np.isnan(expected[2:, 1]).any()
    narrowed = expected[:, -1].min() < 1
    assert narrowed == (noise == 5.0), "where gradients are noise"


JUMPS = {
    "quadratic": lambda s, big: big * s * s,
    "jump": lambda s, big: jnp.where(s > 0.3, big, 1e-3 * s * s),
    "undefined": lambda s, big: jnp.where(s > 0.01 / big, jnp.nan, 1e-3 * s),
    "infinite": lambda s, big: jnp.where(s > 0.5, jnp.inf, 1e-2 * s * s),
    "hopeless": lambda s, big: big + 0 * s,
    "nothing": lambda s, big: 0 * s,
    "still": lambda s, big: 3e-3 + 0 * s,
    "still and far below": lambda s, big: 1e-4 + 0 * s,
    "from nothing to too far": lambda s, big: jnp.where(s > 2.0, 1.0, 0.0),
    "saturated": lambda s, big: 3e-3 * s * s / (1 + s * s),
}


@pytest.mark.parametrize("name", JUMPS)
def test_the_line_search_ends_where_torchs_does(name):
    jitted = jax.jit(
        lambda big, initialized, most: line_search(
            lambda s: JUMPS[name](s, big), 0.01, initialized, most
        )
    )
    ends = set()
    for big, initialized, most in product((1e-9, 0.05, 30.0), (False, True), (math.inf, 3.0)):
        region = TrustRegion(torch.optim.SGD([torch.zeros(1)], lr=1.0))
        region.initialized = initialized
        now = [1.0]

        def rescale(factor: float, now=now) -> None:
            now[0] *= factor

        def kl(now=now, big=big) -> float:
            return float(JUMPS[name](np.float64(now[0]), big))

        scale, end = region.line_search(kl, rescale, 0.01, most)
        found = jitted(big, initialized, most)
        np.testing.assert_allclose(found, [scale, now[0], end], rtol=1e-6)
        ends.add(scale)
    assert len(ends) > 1 or name in ("hopeless", "nothing", "still", "still and far below")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": 2.5}, "steps is 2.5; it must be at least 1 and whole, or None"),
        ({"kl": 0.0}, "kl is 0.0; it must be in"),
        ({"min_lr": 2.0, "max_lr": 1.0}, "min_lr 2 is above max_lr 1"),
        ({"max_lr": 0.5}, "the rate 1 is outside its bounds"),
    ],
)
def test_what_the_trust_region_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        trust_region(1.0, **arguments)


@pytest.mark.parametrize("rate", [0.0, "x", None])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(
        (TypeError, ValueError), match=r"learning_rate is .*; it must be (a|one) number"
    ):
        trust_region(rate)


def test_a_schedule_of_the_rate_that_begins_at_0():
    """The first step moves nothing and is not measured; the ratio is found from the second on."""
    optimizer = trust_region(optax.linear_schedule(0.0, 1.0, 2), kl=0.01)
    params = jnp.zeros(3)
    state, seen = optimizer.init(params), []
    for _ in range(3):
        updates, state = optimizer.update(
            jnp.ones(3), state, params, measure_kl=lambda new: (new**2).sum()
        )
        seen.append((float(state.lr), float(state.kl), float(updates[0])))
    assert seen[0][0] == 0 and math.isnan(seen[0][1]) and seen[0][2] == 0
    assert seen[1][1] == pytest.approx(0.01) and seen[1][0] == pytest.approx((0.01 / 3) ** 0.5)
    assert seen[2][2] == pytest.approx(-seen[2][0])


def test_parameters_are_needed_for_the_kl():
    optimizer = trust_region(1.0)
    state = optimizer.init(jnp.zeros(3))
    with pytest.raises(ValueError, match="give update params"):
        optimizer.update(jnp.ones(3), state, measure_kl=lambda new: 0.0)


BROKEN = {  # sizes of the gradient and of the KL; 0: as it is
    "a gradient": (math.nan, 0.0),
    "a KL": (1.0, math.nan),
    "an infinite KL": (1.0, -math.inf),
    "a KL below 0": (1.0, -0.003),
    "a KL that does not move": (1.0, 0.003),
    "a KL that does not move and is small": (1.0, 1e-4),
}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("at", [0, 2])
def test_a_step_that_is_no_step_is_none_as_in_torch(at, broken, kind):
    """The optimizers go on as if it had not been; apply_if_finite keeps Adam's moments."""
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    region, params = TrustRegion(TORCH[kind]([w], 1.0)), jnp.ones(3)
    own = optax.chain(OPTAX[kind](), trust_region(1.0))
    guarded = kind == "adamw" and broken == "a gradient"
    own = optax.apply_if_finite(own, 3) if guarded else own
    state = own.init(params)

    @jax.jit
    def step(params, state, gradient, given):
        def measure_kl(new):
            return jnp.where(given == 0, ((new - params) ** 2).sum(), given)

        updates, state = own.update(gradient, state, params, measure_kl=measure_kl, grad=gradient)
        return optax.apply_updates(params, updates), state

    for k in range(5):
        size, kl = BROKEN[broken] if k == at else (1.0, 0.0)
        w.grad = torch.full_like(w, size)

        before = w.detach().clone()

        def measure(kl=kl, before=before) -> float:
            return kl or (w.detach() - before).square().sum().item()

        info = region.step(measure)
        params, state = step(params, state, jnp.full(3, size), kl)
        last = state.inner_state[-1] if guarded else state[-1]
        np.testing.assert_allclose(params, w.detach(), rtol=1e-5, atol=1e-12)
        assert float(last.ratio) == pytest.approx(region.ratio, rel=1e-5)
        if not (guarded and k == at):  # of which the transformation has heard nothing
            want = [info.lr, math.nan if info.kl is None else info.kl, info.scale]
            np.testing.assert_allclose([last.lr, last.kl, last.scale], want, rtol=1e-5)


def test_without_apply_if_finite_the_parameters_stay_what_they_were():
    own = optax.chain(optax.scale_by_adam(), trust_region(1.0))
    params = jnp.ones(3)
    state = own.init(params)
    for size in (math.nan, 1.0):
        updates, state = own.update(
            size * jnp.ones(3), state, params, measure_kl=lambda new: ((new - 1) ** 2).sum()
        )
        assert (updates == 0).all() and state[-1].scale == 0 and state[-1].ratio == 1


# The rules

SIGNALS = np.random.RandomState(1).randn(300, 3)
CASES = {  # rules, optax's optimizer and torch's, and the names of the numbers that move
    "sgd": (
        {"lr_rule": "trend+variance+patience", "reward_rule": "trend", "momentum_rule": "relative",
         "trend_window": 5, "patience": 8, "cooldown": 20},
        lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        {"learning_rate": "lr", "momentum": "momentum"},
    ),
    "adamw": (
        {"lr_rule": ["grad_norm", "cosine_restart", {"name": "loss_decay", "loss_k": 0.1}],
         "reward_rule": "kelly+variance", "betas_rule": "relative+variance", "wd_rule": "trend",
         "trend_window": 5, "cycle_length": 20, "max_lr": 0.02},
        lambda: optax.inject_hyperparams(optax.adamw)(
            learning_rate=0.01, b1=0.5, b2=0.9, weight_decay=0.01
        ),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.5, 0.9), weight_decay=0.01),
        {"learning_rate": "lr", "b1": "beta1", "b2": "beta2", "weight_decay": "weight_decay"},
    ),
    "rmsprop": (
        {"lr_rule": "cyclical", "reward_rule": "scaling", "alpha_rule": "stable"},
        lambda: optax.inject_hyperparams(optax.rmsprop)(
            learning_rate=0.01, decay=0.9, eps_in_sqrt=False
        ),
        lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9),
        {"learning_rate": "lr", "decay": "alpha"},
    ),
}  # fmt: skip


def numbers_of(group, names) -> list[float]:
    flat = group | dict(zip(("beta1", "beta2"), group.get("betas", (0, 0)), strict=True))
    return [float(flat[name]) for name in names]


@pytest.mark.parametrize("kind", CASES)
def test_the_rules_walk_as_torchs_do(kind):
    """Weights of a quadratic, with noisy signals; the numbers that each step took."""
    rules, make, make_torch, names = CASES[kind]
    weights = torch.ones(4, dtype=torch.float64, requires_grad=True)
    base = make_torch([weights])
    reference = AdaptiveOptimizer(base, **rules)
    expected: list[list[float]] = []
    base.register_step_pre_hook(
        lambda own, *_: expected.append(numbers_of(own.param_groups[0], names.values()))
    )
    inner, now = make(), []

    def watched(updates, state, params=None, **_):
        jax.debug.callback(lambda own: now.append(own), state.hyperparams, ordered=True)
        return inner.update(updates, state, params)

    optimizer = adaptive(optax.GradientTransformation(inner.init, watched), **rules)
    params = jnp.ones(4, jnp.float64)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, loss, reward):
        updates, state = optimizer.update(params, state, params, loss=loss, reward=reward)
        return optax.apply_updates(params, updates), state

    for k, (loss, reward, _) in enumerate(SIGNALS):
        loss = 3 + loss * 0.1 - 0.002 * k
        weights.grad = weights.detach().clone()
        reference.observe(loss=loss, reward=reward)
        reference.step()
        params, state = step(params, state, loss, reward)
    jax.effects_barrier()
    found = [[float(own[name]) for name in names] for own in now]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(params, weights.detach(), rtol=1e-6, atol=1e-12)
    assert (np.ptp(expected, axis=0) > 0).all(), "every number has moved"


def test_a_state_is_all_there_is():
    """A step is a pure function: from an older state it is what it was, also in a new optimizer."""
    rules = CASES["sgd"][0]
    states, walks = [], []
    for _ in range(2):
        optimizer = adaptive(CASES["sgd"][1](), **rules)
        state = states[10] if states else optimizer.init(jnp.ones(4))
        rates = []
        for k in range(10 if states else 0, 40):
            if not walks:
                states.append(state)
            signals = {"loss": SIGNALS[k, 0], "reward": SIGNALS[k, 1]}
            _, state = optimizer.update(jnp.ones(4), state, jnp.ones(4), **signals)
            rates.append(float(state.inner.hyperparams["learning_rate"]))
        walks.append(rates)
    assert walks[0][10:] == walks[1] and len({*walks[1]}) > 2


def test_what_the_rules_refuse():
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    with pytest.raises(ValueError, match="there is no rule 'tend'"):
        adaptive(inner, "tend")
    with pytest.raises(ValueError, match="trust_region needs a KL"):
        adaptive(inner, "trust_region")
    with pytest.raises(ValueError, match="adaptive moves injected numbers"):
        adaptive(optax.sgd(0.1), "trend").init(jnp.ones(4))
    schedule = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(0, 1, 5))
    with pytest.raises(ValueError, match="the rate is a schedule"):
        adaptive(schedule, "trend").init(jnp.ones(4))


def test_the_rules_warn_in_the_words_of_optax(caplog):
    """Of a number that `inner` lacks, once; never of one that it has; and of missing signals."""

    def warned(**numbers) -> list[str]:
        caplog.clear()
        inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, **numbers)
        optimizer = adaptive(inner, momentum_rule="relative")
        state = optimizer.init(jnp.ones(2))
        for _ in range(20):
            _, state = optimizer.update(jnp.ones(2), state, jnp.ones(2))
        jax.block_until_ready(state.memory)
        return [record.getMessage() for record in caplog.records]

    silent = "no loss was observed in 20 steps, so momentum_rule relative moves nothing: "
    silent += "give it a loss in each step"
    assert warned(momentum=0.9) == [silent]
    assert warned() == ["momentum_rule moves nothing: the optimizer has no momentum", silent]
