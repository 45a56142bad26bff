"""The trust region: updates scaled afterwards until their KL meets a target, and that target."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch

from adaptiverl.optim.mini import AdamMini
from adaptiverl.optim.signals import MEMORY, SignalToNoise
from adaptiverl.optim.trust_region import MIN_CONFIDENCE, TRUSTED, TrustRegion
from adaptiverl.optim.update import (
    LastUpdate,
    alignment,
    alignment_and_finite,
    has_gradient,
    supports_alignment,
)

KINDS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adam_mini": lambda p: AdamMini(p, lr=0.1, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
}
COPIED = {
    "sgd decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "strong decay": lambda p: torch.optim.AdamW(p, lr=0.9, weight_decay=0.9),
    "rmsprop bare": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def stepped(make, steps: int = 3):
    """An optimizer in the middle of its work, with new gradients."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    optimizer = make(weights)
    for _ in range(steps):
        for p in weights:
            p.grad = torch.randn_like(p)
        optimizer.step()
    for p in weights:
        p.grad = torch.randn_like(p)
    return weights, optimizer


@pytest.mark.parametrize("kind", [*KINDS, *COPIED])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_update_is_scaled_as_if_the_old_weights_were_kept(kind, steps):
    weights, optimizer = stepped((KINDS | COPIED)[kind], steps)
    old = [p.detach().clone() for p in weights]
    update = LastUpdate(optimizer)
    assert bool(update.old) != kind.startswith("adam"), "a copy only where it cannot be avoided"
    optimizer.step()
    optimizer.zero_grad()  # as a measure_kl may do that needs the memory
    new = [p.detach().clone() for p in weights]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for factor, whole in ((0.3, 0.3), (5.0, 1.5), (0.2, 0.3), (0.0, 0.0)):
        update.rescale(factor)
        for p, before, after in zip(weights, old, new, strict=True):
            torch.testing.assert_close(p, before.lerp(after, whole), rtol=1e-5, atol=1e-6)
    for a, b in zip(state.values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("kind", sorted({*KINDS, "adagrad"} - {"adamw fused"}))
def test_an_update_of_complex_weights_is_scaled_alike(kind):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, dtype=torch.complex64))
    optimizer = (KINDS | COPIED)[kind]([p])
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    old, update = p.detach().clone(), LastUpdate(optimizer)
    optimizer.step()
    new = p.detach().clone()
    for factor, whole in ((0.3, 0.3), (5.0, 1.5), (0.0, 0.0)):
        update.rescale(factor)
        torch.testing.assert_close(p.detach(), old + whole * (new - old))
    assert alignment(optimizer) is None and not supports_alignment(optimizer)


@pytest.mark.parametrize("kind", ["sgd", "sgd momentum alone"])
def test_sparse_gradients_are_as_good_as_dense_ones(kind):
    """The same updates, scaled alike, and the same alignment; one row comes twice."""
    make = {"sgd momentum alone": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)}
    seen = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = torch.nn.Embedding(6, 3, sparse=sparse)
        optimizer = (KINDS | COPIED | make)[kind](net.parameters())
        for step in range(3):
            optimizer.zero_grad()
            net(torch.tensor([1, 2, 2 + step])).square().sum().backward()
            found, update = [has_gradient(optimizer), alignment(optimizer)], LastUpdate(optimizer)
            optimizer.step()
            update.rescale(0.3)
        seen.append((net.weight.detach(), found))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    assert seen[0][1] == pytest.approx(seen[1][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["adamw", "adam_mini", "sgd momentum"])
def test_weights_of_16_bits_are_copied_and_restored_exactly(kind, dtype):
    """The difference of two rounded weights is not the update."""
    torch.manual_seed(0)
    short, long = (
        torch.nn.Parameter(torch.randn(64, dtype=dtype)),
        torch.nn.Parameter(torch.ones(3)),
    )
    optimizer = KINDS[kind]([short, long])
    before, update = None, None
    for _ in range(2):
        short.grad, long.grad = torch.randn_like(short).sign(), torch.randn_like(long)
        before, update = short.detach().clone(), LastUpdate(optimizer)
        optimizer.step()
    assert [*update.old] == ([short, long] if kind.startswith("sgd") else [short])
    assert supports_alignment(optimizer) and alignment(optimizer) > 0.5, "its state has it still"
    after = short.detach().clone()
    update.rescale(0.25)
    assert torch.equal(short, before.lerp(after, 0.25))
    short.data[0] = math.nan  # as AdamW's step in fp16 is where v is 0
    update.rescale(0.0)
    assert torch.equal(short, before) and not torch.equal(before, after)


def test_an_update_of_16_bits_is_scaled_up_again_without_loss():
    """Between two numbers of bf16 there is nothing: scaled down it may be gone."""
    weight = torch.nn.Parameter(torch.full((4,), 256.0, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, -2.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    update = LastUpdate(optimizer)
    optimizer.step()
    assert weight.tolist() == [258.0] * 4
    update.rescale(0.125)
    assert weight.tolist() == [256.0] * 4, "the next number is 258"
    update.rescale(8.0)
    assert weight.tolist() == [258.0] * 4


@pytest.mark.parametrize("kind", ["AdamW", "AdamMini"])
def test_a_policy_in_bf16_moves_as_far_as_it_is_told(kind):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 100)
    ).bfloat16()
    x = torch.randn(32, 64, dtype=torch.bfloat16)

    def logprobs() -> torch.Tensor:
        return net(x).detach().float().log_softmax(-1)

    region = TrustRegion({"AdamW": torch.optim.AdamW, "AdamMini": AdamMini}[kind](
        net.parameters(), lr=1.0
    ))  # fmt: skip
    for _ in range(3):
        net.zero_grad()
        (-net(x).float().log_softmax(-1)[:, 0].mean()).backward()
        old = logprobs()

        def kl(old=old) -> float:
            return (old.exp() * (old - logprobs())).sum(-1).mean().item()

        info = region.step(kl)
        assert info.kl == kl() and 0.001 < info.kl <= 2 * info.target


@pytest.mark.parametrize("kind", ["sgd", "sgd momentum", "rmsprop", "adamw", "adam_mini"])
def test_weights_survive_an_update_that_dwarfs_them(kind):
    """SGD's update of 1e9 rounds a weight of 1 away; the others' are as large where the rate is."""
    weights, optimizer = stepped(KINDS[kind], 0)
    for group in optimizer.param_groups:
        group |= {"lr": 1e9, "weight_decay": 0.0}
    old = [p.detach().clone() for p in weights]

    def far() -> float:
        pairs = zip(weights, old, strict=True)
        return sum((p - before).square().sum().item() for p, before in pairs)

    region = TrustRegion(optimizer, max_lr=1e10)
    info = region.step(far)
    assert 0 < info.kl <= 2 * info.target and info.kl == far()
    for p in weights:
        p.grad = torch.full_like(p, 1e9)
    old = [p.detach().clone() for p in weights]
    assert region.step(lambda: math.nan).scale == 0.0, "taken back"
    for p, before in zip(weights, old, strict=True):
        torch.testing.assert_close(p.detach(), before)


def test_weights_without_gradient_stay():
    weights, optimizer = stepped(KINDS["adamw"])
    weights[1].grad = None
    update, still = LastUpdate(optimizer), weights[1].detach().clone()
    optimizer.step()
    update.rescale(0.5)
    assert torch.equal(weights[1], still)


def make(initialized: bool = False, **arguments) -> TrustRegion:
    """One around an optimizer that is of no interest."""
    region = TrustRegion(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]), **arguments)
    region.initialized = initialized
    return region


class Quadratic:
    """KL = at_one · scale²."""

    def __init__(self, at_one: float):
        self.at_one, self.scale, self.measured = at_one, 1.0, 0

    def measure(self) -> float:
        self.measured += 1
        return self.at_one * self.scale**2

    def rescale(self, factor: float) -> None:
        self.scale *= factor


@pytest.mark.parametrize(
    ("initialized", "at_one", "factor", "measured"),
    [
        (True, 0.01, 1, 1),  # met
        (True, 0.019, 1, 1),  # within twice the target
        (True, 1.0, 0.1, 2),  # a hundred times too far
        (True, 1e-6, 1, 1),  # short: the rate will follow, the step stays
        (False, 1e-4, 10, 2),  # the first may be made larger
        (False, 0.01 / 3600, 60, 3),  # in strides of 30
        (True, 36.0, 1 / 60, 3),
    ],
)
def test_the_factor_that_meets_the_target(initialized, at_one, factor, measured):
    region, world = make(initialized), Quadratic(at_one)
    found, kl = region.line_search(world.measure, world.rescale, 0.01)
    assert (found, world.measured) == (pytest.approx(factor), measured)
    assert found == pytest.approx(world.scale)
    assert kl == world.measure()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_undefined_kl_is_too_far(broken):
    world = Quadratic(1e4)
    measured = world.measure

    def measure() -> float:
        return broken if world.scale > 0.01 else measured()

    factor, kl = make(True).line_search(measure, world.rescale, 0.01)
    assert factor == pytest.approx(1 / 900), "two strides down"
    assert kl == measured() <= 0.02


def test_an_update_is_made_no_larger_than_it_may_be():
    world = Quadratic(1e-12)
    factor, kl = make().line_search(world.measure, world.rescale, 0.01, max_scale=500.0)
    assert factor == pytest.approx(500) == world.scale and kl == world.measure()


def test_an_update_that_cannot_be_made_small_enough_is_taken_back():
    world = Quadratic(1.0)
    factor, kl = make().line_search(lambda: 1.0, world.rescale, 0.01)
    assert world.scale == 0 and kl == 0
    assert 0 < factor < 1e-6, "the rate shrinks by it, and is not lost"


@pytest.mark.parametrize("edge", [0.02, 0.7, 1.0, 3.0, 29.0, 500.0])
@pytest.mark.parametrize("above", [0.5, 50.0, math.inf, math.nan])
def test_where_kl_jumps_the_search_ends_next_to_the_jump(edge, above):
    """A mixture of experts: next to nothing up to `edge`, and far too much from there on."""
    world = Quadratic(1e-9)

    def measure() -> float:
        kl = world.measure()
        return kl if world.scale < edge else above

    factor, kl = make().line_search(measure, world.rescale, 0.01)
    assert factor == pytest.approx(world.scale) and kl == pytest.approx(1e-9 * factor**2)
    assert edge / 2 < factor < edge, "the largest scale within bounds, nearly"
    assert world.measured <= 13


def test_signal_to_noise_is_the_weighted_t_statistic():
    chance = np.random.default_rng(0)
    values = chance.normal(0.02, 0.03, 40)
    signal = SignalToNoise()
    for value in values:
        signal.observe(float(value))
    weights = MEMORY ** np.arange(len(values))[::-1]
    mean = np.average(values, weights=weights)
    variance = np.average((values - mean) ** 2, weights=weights)
    error = math.sqrt(variance * (weights**2).sum() / weights.sum() ** 2)
    assert signal.value == pytest.approx(mean / error)


def test_confidence_follows_the_signal_to_noise_ratio():
    unsure, sure = make(), make()
    for k in range(TRUSTED):
        assert unsure.confidence == 1.0, "no evidence yet"
        unsure.observe_alignment(None)
        unsure.observe_alignment((-1) ** k * 0.02)
    assert unsure.confidence == MIN_CONFIDENCE
    for k in range(60):
        unsure.observe_alignment((-1) ** k * 0.02)
        sure.observe_alignment(0.02 + (-1) ** k * 0.02)
    assert unsure.confidence == MIN_CONFIDENCE
    assert sure.confidence == 1.0
    sure.observe_alignment(math.nan)
    assert sure.confidence == 1.0, "not a number, no evidence"


def test_confidence_is_1_where_no_alignment_can_be_known():
    assert TrustRegion(torch.optim.Adagrad([torch.nn.Parameter(torch.ones(1))])).confidence == 1.0


def test_steps_without_a_difference_between_rewards_are_no_evidence():
    """Their gradients, of a penalty alone, point back: they would count against all that moved."""
    world, heard = World(kl=0.01), World(kl=0.01)
    for k in range(2 * TRUSTED + 1):
        gradient = 1.0 if k % 2 else -1e-3
        world.step(gradient, informative=k % 2 == 1)
        heard.step(gradient)
    assert world.region.informative_steps == TRUSTED
    assert world.region.alignments.mean > 0.5 > abs(heard.region.alignments.mean)


@pytest.mark.parametrize(
    ("steps", "kl"),
    [(None, 0.004), (1, 0.016), (15, 0.016), (40, 0.006), (60, 0.004), (600, 0.004)],
)
def test_a_short_run_has_a_larger_target(steps, kl):
    assert make(steps=steps).target == pytest.approx(kl)
    assert make(steps=steps, kl=0.5).target == 0.5, "a number is taken as it is"


@pytest.mark.parametrize("kind", ["sgd momentum", "rmsprop", "adamw", "adam_mini"])
def test_alignment_is_the_cosine_between_gradient_and_last_update(kind):
    weights, optimizer = stepped(KINDS[kind])
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    old = torch.cat([p.detach().flatten() for p in weights]).clone()
    optimizer.step()
    for p in weights:
        p.grad = torch.randn_like(p)
    down = old - torch.cat([p.detach().flatten() for p in weights])
    gradient = torch.cat([p.grad.flatten() for p in weights])
    expected = torch.cosine_similarity(down, gradient, 0).item()
    assert alignment(optimizer) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "known"),
    [
        (partial(torch.optim.AdamW, lr=1e-3), True),
        (partial(AdamMini, lr=1e-3), True),
        (partial(torch.optim.SGD, lr=1e-3, momentum=0.9), True),
        (partial(torch.optim.SGD, lr=1e-3), False),
        (partial(torch.optim.RMSprop, lr=1e-3), False),
        (partial(torch.optim.Adagrad, lr=1e-3), False),
    ],
)
def test_whether_an_optimizer_supports_alignment(optimizer, known):
    p = torch.nn.Parameter(torch.ones(3))
    made = optimizer([p])
    assert supports_alignment(made) is known
    for _ in range(2):
        p.grad = torch.ones(3)
        made.step()
    assert (alignment(made) is not None) is known


def test_alignment_is_unknown_before_the_first_step_and_of_unknown_optimizers():
    assert alignment(stepped(KINDS["adamw"], 0)[1]) is None
    assert alignment(stepped(COPIED["adagrad"])[1]) is None
    assert alignment(stepped(KINDS["sgd"])[1]) is None, "no momentum, no memory of the update"


# A step of it


class World:
    """One weight; the KL of an update is `steepness` times its square. Its gradient is always 1."""

    def __init__(self, lr: float = 0.1, steepness: float = 1.0, kind=torch.optim.AdamW, **more):
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        arguments = {"weight_decay": 0.0} if kind is torch.optim.AdamW else {}
        self.optimizer = kind([self.weight], lr=lr, **arguments)
        self.entries: list[dict] = []
        self.region = TrustRegion(self.optimizer, record=self.entries.append, **more)
        self.steepness, self.before = steepness, 0.0

    def kl(self) -> float:
        return self.steepness * (self.weight.item() - self.before) ** 2

    def step(self, gradient: float = 1.0, measure=None, **more):
        self.before = self.weight.item()
        self.weight.grad = torch.full_like(self.weight, gradient)
        return self.region.step(measure or self.kl, **more)


@pytest.mark.parametrize("lr", [1e-7, 1e-2, 1.0])
def test_every_step_meets_the_target_and_the_group_keeps_its_rate(lr):
    """AdamW's first step has the length of its rate."""
    world = World(lr=lr, kl=0.01)
    for _ in range(8):
        info = world.step()
        assert info.kl == world.kl() <= 2 * info.target
        assert info.target == 0.01
        assert world.optimizer.param_groups[0]["lr"] == lr
    assert info.kl >= info.target / 2
    assert info.lr == pytest.approx(abs(world.weight.item() - world.before), rel=1e-3)


def test_the_first_step_is_searched_for_and_later_ones_are_only_scaled_down():
    world = World(lr=1e-3, kl=0.001)
    first = world.step()
    assert first.scale == pytest.approx(30), "made larger, by one stride: within the tolerance"
    world.steepness = 1e-6
    assert world.step().scale == 1.0, "short of the target: the rate follows, the step stays"
    world.steepness = 1e3
    assert world.step().scale < 0.1


@pytest.mark.parametrize(("kl", "factor"), [(1.0, 1), (1 / 16, 2), (1.9, 1.9**-0.25), (1e-9, 2)])
def test_the_rate_goes_half_of_the_way_at_most_a_factor_of_two(kl, factor):
    world = World(kind=torch.optim.Adagrad, kl=1.0)
    world.region.initialized = True
    world.step(measure=lambda: kl)
    assert world.region.ratio == pytest.approx(factor)


@pytest.mark.parametrize("steps", [4, None])
def test_the_target_falls_linearly_where_the_length_is_known(steps):
    world = World(kind=torch.optim.Adagrad, kl=1.0, steps=steps)
    targets = [world.step().target for _ in range(6)]
    assert targets == ([1, 0.75, 0.5, 0.25, 0.25, 0.25] if steps else [1.0] * 6)


def test_the_target_is_not_below_the_floor():
    assert World(kl=1e-6).step(min_kl=0.5).target == 0.5


def test_the_rate_does_not_wind_up_behind_its_bound():
    """While an update moves nothing the rate waits at the bound, ready to fall at once."""
    world = World(lr=1.0, kind=torch.optim.Adagrad, kl=0.01, max_lr=4.0)
    world.region.initialized = True
    for _ in range(50):
        assert world.step(measure=lambda: 0.0).lr <= 4
    assert world.region.ratio == pytest.approx(4)
    kl = iter([0.16, 0.01])
    world.step(measure=lambda: next(kl))
    assert world.region.ratio == pytest.approx(1), "scaled to a quarter, which met the target"


def test_a_rate_that_is_scaled_down_below_its_bound_is_warned_of_once(caplog):
    """Each step is scaled down anew from there: the records have its rate, and the way back."""
    world = World(lr=1.0, kl=0.01, min_lr=0.5)
    for _ in range(3):
        kl = iter([1.0, 0.01])
        assert world.step(measure=lambda kl=kl: next(kl)).lr < 0.5
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(
        "trust_region, step 1: an update had to be scaled down below min_lr 0.5, "
    )
    moves = [(row["step"], row["rule"], row["old"], row["new"]) for row in world.entries]
    assert moves == [
        (0, "line_search", 1.0, pytest.approx(0.1)), (0, "min_lr", pytest.approx(0.1), 0.5),
        (1, "line_search", 0.5, pytest.approx(0.05)), (1, "min_lr", pytest.approx(0.05), 0.5),
        (2, "line_search", 0.5, pytest.approx(0.05)), (2, "min_lr", pytest.approx(0.05), 0.5),
    ]  # fmt: skip


def test_while_there_is_no_gradient_nothing_is_measured():
    world = World(lr=1e-3)
    info = world.step(gradient=0.0, measure=lambda: pytest.fail("measured"))
    assert (info.kl, info.lr, info.scale) == (None, 1e-3, 1.0)
    assert world.region.ratio == 1.0 and not world.region.initialized
    assert world.step().kl is not None


def test_a_rate_of_0_stays_0_until_it_rises():
    world = World(lr=0.0)
    info = world.step(measure=lambda: pytest.fail("measured"))
    assert (info.lr, info.kl) == (0.0, None)
    world.optimizer.param_groups[0]["lr"] = 1e-3  # a warm-up has begun
    assert world.step().kl is not None


def test_an_update_that_no_scale_brings_within_bounds_is_taken_back():
    """It does not raise the rate, and the next one is searched for too."""
    world = World(lr=1.0, kl=0.01)
    info = world.step(measure=lambda: 1.0)
    assert world.weight.item() == pytest.approx(0, abs=1e-12) and info.kl == 0.0
    assert 0 < info.scale < 1e-6 and world.region.ratio == 1e-9, "the lower bound of the rate"
    assert info.lr == pytest.approx(info.scale)
    assert not world.region.initialized
    assert [entry["rule"] for entry in world.entries] == ["line_search", "min_lr"]
    assert world.step().scale > 10


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("initialized", [False, True])
def test_a_kl_that_is_never_finite_halves_the_rate_and_takes_the_update_back(
    broken, initialized, caplog
):
    world = World(lr=1.0, kl=0.01)
    world.region.initialized = initialized
    for ratio in (0.5, 0.25):
        info = world.step(measure=lambda: broken)
        assert world.weight.item() == pytest.approx(0, abs=1e-12)
        assert (info.kl, info.scale) == (None, 0.0), "as if the step had been left out"
        assert (info.lr, world.region.ratio) == (2 * ratio, ratio)
        assert world.region.initialized is initialized
    assert [r.getMessage()[:52] for r in caplog.records] == [
        "trust_region, step 1: the KL of an update was NaN or"
    ], "once"


@pytest.mark.parametrize("initialized", [False, True])
def test_a_negative_kl_is_no_information(initialized, caplog):
    world = World(lr=1e-3, kl=0.01)
    world.region.initialized = initialized
    for step in (1, 2):
        info = world.step(measure=lambda: -0.003)
        assert (info.kl, info.scale, info.lr) == (-0.003, 1.0, 1e-3)
        assert world.region.ratio == 1.0 and world.region.initialized is initialized
        assert world.weight.item() == pytest.approx(-1e-3 * step)
    assert len(caplog.records) == 1 and "measure_kl gave a KL below 0" in caplog.text
    assert world.step().scale > 10 or initialized, "the next one is searched for"


@pytest.mark.parametrize("kl", [0.0, 1e-6, 1e-4, 0.003])
def test_a_kl_that_does_not_move_leaves_update_and_rate(kl, caplog):
    """As of a measure_kl that was computed before the step."""
    world = World(lr=1e-3, kl=0.01)
    for step in (1, 2):
        info = world.step(measure=lambda: kl)
        assert (info.kl, info.scale, info.lr, world.region.ratio) == (kl, 1.0, 1e-3, 1.0)
        assert world.weight.item() == pytest.approx(-1e-3 * step)
    assert "the policy as it is when it is called" in caplog.text and len(caplog.records) == 1
    assert world.step().scale > 10, "the next one is searched for"


@pytest.mark.parametrize("decay", [0.01, 0.1, 3.0])
def test_an_update_that_was_scaled_in_vain_leaves_the_weights_of_its_step(decay):
    """Larger rates than 0.5 / decay could not be taken off again."""
    world = World(lr=1e-3, kl=0.01)
    world.weight.data += 1
    world.optimizer.param_groups[0]["weight_decay"] = decay
    world.step(measure=lambda: 0.0)
    assert world.weight.item() == pytest.approx(1 - 1e-3 - 1e-3 * decay, abs=1e-9)


def test_a_kl_that_rises_to_less_than_the_target_is_one_that_moves():
    world = World(lr=1e-7, kl=0.01)
    info = world.step(measure=lambda: 0.003 * (square := world.kl()) / (1e-6 + square))
    assert info.scale > 1e4 and info.kl == pytest.approx(0.003, rel=0.1)


@pytest.mark.parametrize("edge", [3e-7, 1e-5, 1e-2])
def test_a_kl_that_jumps_from_nothing_to_too_far_is_searched(edge, caplog):
    world = World(lr=1e-7, kl=0.01)
    info = world.step(measure=lambda: float(world.kl() > edge**2))
    assert edge / 2 < info.lr <= edge and info.kl == 0 and not caplog.records


def test_rounding_at_a_small_max_lr_is_no_kl_that_does_not_move(caplog):
    world = World(lr=1e-7, kl=0.01, max_lr=1e-6)
    noise = iter([-4e-9, 2e-9, -6e-9, 1e-9, 3e-9])
    infos = [world.step(measure=lambda: next(noise)) for _ in range(3)]
    assert [info.lr for info in infos] == [1e-6] * 3 and not caplog.records


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_rate_whose_updates_are_lost_in_rounding_rises(kind, caplog):
    """From 1e-9 a weight of 1 in 32 bits does not move, and a copy of it scales nothing."""
    world = World(lr=1e-9, kl=0.01, kind=kind)
    world.weight = torch.nn.Parameter(torch.ones(1))
    world.optimizer.param_groups[0]["params"] = [world.weight]
    first = world.step()
    assert (first.kl, world.weight.item()) == (0, 1) and world.region.ratio == 30
    infos = [world.step() for _ in range(3)]
    assert 0.005 <= infos[-1].kl <= 0.02 and not caplog.records


def test_a_kl_below_0_after_the_update_was_scaled_down_leaves_it_there():
    world = World(lr=1.0, kl=0.01)
    world.region.initialized = True
    kl = iter([1.0, -0.003])
    info = world.step(measure=lambda: next(kl))
    assert info.scale == world.region.ratio == pytest.approx(0.1) == -world.weight.item()


def test_a_kl_below_0_by_rounding_is_a_small_one():
    """The first update is searched upwards: from 1e-7 the KL is lost in rounding."""
    world = World(lr=1e-7, kl=0.01)
    info = world.step(measure=lambda: world.kl() - 5e-7)
    assert info.scale > 1e4 and 0.005 <= info.kl <= 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("informative", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "adam_mini", "rmsprop bare", "adagrad"])
def test_a_gradient_that_is_not_finite_is_no_step(kind, informative, steps, bad, caplog):
    weights, optimizer = stepped((KINDS | COPIED)[kind], steps)
    region = TrustRegion(optimizer, kl=0.01)
    region.initialized = steps > 0
    before = copy.deepcopy((weights, optimizer.state_dict(), region.alignments, region.ratio))
    weights[1].grad[0] = bad
    for time in (1, 2):
        info = region.step(lambda: pytest.fail("measured"), informative=informative)
        assert (info.kl, info.scale, info.lr, region.time) == (None, 0.0, 0.1, time)
    after = copy.deepcopy((weights, optimizer.state_dict(), region.alignments, region.ratio))
    assert all(map(torch.equal, before[0], after[0]))
    assert str(before[1:]) == str(after[1:])
    assert [r.getMessage()[:44] for r in caplog.records] == [
        "trust_region, step 1: a gradient is not fini"
    ], "once"


@pytest.mark.parametrize("kind", ["sgd momentum", "adamw", "adam_mini"])
def test_alignment_leaves_out_weights_that_have_not_moved_yet(kind):
    """Of two groups, one has a weight that got its first gradient just now."""
    moved, still = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    groups = [{"params": [moved]}, {"params": [still]}]
    optimizer = KINDS[kind](groups)
    moved.grad = torch.tensor([3.0, 3.0])
    optimizer.step()
    moved.grad, still.grad = torch.tensor([1.0, 0.0]), torch.tensor([100.0, 0.0])
    assert alignment(optimizer) == pytest.approx(math.sqrt(0.5), rel=1e-3)
    still.grad[0] = math.inf
    assert alignment_and_finite(optimizer) == (pytest.approx(math.sqrt(0.5), rel=1e-3), False)


def test_a_direction_of_0_over_0_is_no_gradient_that_is_not_finite():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = AdamMini([p], lr=0.1, eps=0.0)
    p.grad = torch.zeros(2)
    optimizer.step()
    assert alignment_and_finite(optimizer) == (None, True)


def test_large_gradients_of_fp16_are_finite():
    """Their squares are not, in fp16."""
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    p.grad = torch.full_like(p, 6e4)
    assert alignment_and_finite(torch.optim.SGD([p])) == (None, True)


def test_a_measure_that_raises_takes_the_update_back():
    world = World(lr=1.0, kl=0.01)
    with pytest.raises(KeyboardInterrupt):
        world.step(measure=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert world.weight.item() == pytest.approx(0, abs=1e-12)
    assert world.region.time == 0 and world.region.ratio == 1.0


def test_a_kl_with_a_gradient_is_a_number():
    """A tensor would keep its graph in the info and in the ratio."""
    world = World(lr=1.0, kl=0.01)
    graphs = []

    def measure() -> torch.Tensor:
        kl = (world.weight - world.before).square().sum()
        graphs.append(kl.grad_fn)
        return kl

    info = world.step(measure=measure)
    assert type(info.kl) is type(world.region.ratio) is float and set(graphs) == {None}
    assert copy.deepcopy(world.region.state_dict()) == world.region.state_dict()
    with pytest.raises(TypeError, match="measure_kl returned None; it must return the KL"):
        world.step(measure=lambda: None)
    with pytest.raises(TypeError, match=r"measure_kl is 0\.01; it must be a function without arg"):
        world.step(measure=0.01)


def test_each_change_of_the_rate_has_its_reason():
    world = World(lr=1.0, kl=0.01)
    info = world.step()
    search, steering = world.entries
    assert search == {
        "step": 0, "hyperparameter": "lr", "rule": "line_search", "signal": "kl",
        "value": info.kl, "old": 1.0, "new": pytest.approx(info.lr),
    }  # fmt: skip
    assert (steering["rule"], steering["old"]) == ("trust_region", search["new"])
    assert steering["new"] == pytest.approx(world.region.ratio)


def test_another_scheduler_of_the_rate_composes():
    world = World(lr=1e-2, kl=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(world.optimizer, 1, gamma=0.5)
    for k in range(5):
        ratio = world.region.ratio
        info = world.step()
        assert info.lr == pytest.approx(1e-2 * 0.5**k * ratio * info.scale)
        schedule.step()


def test_saved_and_loaded_it_continues_bit_for_bit():
    worlds = [World(lr=1.0, kl=0.01, steps=20) for _ in range(2)]
    for _ in range(8):
        worlds[0].step()
    other = worlds[1]
    other.region.load_state_dict(worlds[0].region.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(worlds[0].optimizer.state_dict()))
    other.weight.data.copy_(worlds[0].weight.data)
    assert [other.step() for _ in range(5)] == [worlds[0].step() for _ in range(5)]
    assert all(type(value) in (int, float, bool) for value in other.region.state_dict().values())


@pytest.mark.parametrize("wrong", ["missing", "unknown"])
def test_a_state_of_something_else_is_refused(wrong):
    state = make().state_dict()
    state = state | {"most": 1} if wrong == "unknown" else {"ratio": 1.0}
    with pytest.raises(ValueError, match=f"no state of a trust region: .* is {wrong}"):
        make().load_state_dict(state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kl": 0.0}, "kl is 0.0; it must be in"),
        ({"kl": math.nan}, "kl is nan"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": 2.5}, "steps is 2.5; it must be at least 1 and whole, or None"),
        ({"min_lr": 2.0, "max_lr": 1.0}, "min_lr 2 is above max_lr 1"),
        ({"max_lr": 1e-4}, "the rate 0.001 is outside its bounds, 1e-09 … 0.0001"),
    ],
)
def test_arguments_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**wrong)


def test_a_target_that_is_a_text_is_refused():
    with pytest.raises(TypeError, match="kl is 'a'; it must be one number"):
        make(kl="a")


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"optimizer is -1; it must be a torch\.optim\.Optimizer"):
        TrustRegion(-1)
