"""The brake: updates scaled after the fact, to a KL that is met, with the evidence for how far."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch

from adaptiverl.optim.trust_region import LEAST, MEMORY, LastUpdate, TrustRegion, alignment, tells

KINDS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
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
    assert bool(update.old) == (kind in COPIED), "a copy only where it cannot be avoided"
    optimizer.step()
    new = [p.detach().clone() for p in weights]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for factor, whole in ((0.3, 0.3), (5.0, 1.5), (0.2, 0.3), (0.0, 0.0)):
        update.rescale(factor)
        for p, before, after in zip(weights, old, new, strict=True):
            torch.testing.assert_close(p, before.lerp(after, whole), rtol=1e-5, atol=1e-6)
    for a, b in zip(state.values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_weights_without_gradient_stay():
    weights, optimizer = stepped(KINDS["adamw"])
    weights[1].grad = None
    update, still = LastUpdate(optimizer), weights[1].detach().clone()
    optimizer.step()
    update.rescale(0.5)
    assert torch.equal(weights[1], still)


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
    ("settled", "at_one", "factor", "measured"),
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
def test_the_factor_that_meets_the_target(settled, at_one, factor, measured):
    region, world = TrustRegion(settled=settled), Quadratic(at_one)
    found, kl = region.fit(world.measure, world.rescale, 0.01)
    assert (found, world.measured) == (pytest.approx(factor), measured)
    assert found == pytest.approx(world.scale)
    assert kl == world.measure()
    assert region.settled


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_undefined_kl_is_too_far(broken):
    world = Quadratic(1e4)
    measured = world.measure

    def measure() -> float:
        return broken if world.scale > 0.01 else measured()

    factor, kl = TrustRegion(settled=True).fit(measure, world.rescale, 0.01)
    assert factor == pytest.approx(1 / 900), "two strides down"
    assert kl == measured() <= 0.02


def test_an_update_is_made_no_larger_than_it_may_be():
    world = Quadratic(1e-12)
    factor, kl = TrustRegion().fit(world.measure, world.rescale, 0.01, most=500.0)
    assert factor == pytest.approx(500) == world.scale and kl == world.measure()


def test_an_update_that_cannot_be_made_small_enough_is_taken_back():
    world = Quadratic(1.0)
    factor, kl = TrustRegion().fit(lambda: 1.0, world.rescale, 0.01)
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

    region = TrustRegion()
    factor, kl = region.fit(measure, world.rescale, 0.01)
    assert factor == pytest.approx(world.scale) and kl == pytest.approx(1e-9 * factor**2)
    assert edge / 2 < factor < edge, "the largest scale within bounds, nearly"
    assert world.measured <= 13 and region.settled


def test_an_update_taken_back_leaves_the_search_to_the_next_one():
    world, region = Quadratic(1.0), TrustRegion()
    region.fit(lambda: 1.0, world.rescale, 0.01)
    assert world.scale == 0 and not region.settled
    world = Quadratic(1e-4)
    assert region.fit(world.measure, world.rescale, 0.01)[0] == pytest.approx(10)


def test_evidence_is_the_weighted_t_statistic():
    chance = np.random.default_rng(0)
    values = chance.normal(0.02, 0.03, 40)
    region = TrustRegion()
    for value in values:
        region.confidence(float(value))
    weights = MEMORY ** np.arange(len(values))[::-1]
    mean = np.average(values, weights=weights)
    variance = np.average((values - mean) ** 2, weights=weights)
    error = math.sqrt(variance * (weights**2).sum() / weights.sum() ** 2)
    assert region.evidence == pytest.approx(mean / error)


def test_confidence_follows_evidence():
    unsure, sure = TrustRegion(), TrustRegion()
    assert unsure.confidence(None) == LEAST, "no evidence yet"
    for k in range(60):
        low = unsure.confidence((-1) ** k * 0.02)
        high = sure.confidence(0.02 + (-1) ** k * 0.02)
    assert low == LEAST
    assert high == 1.0
    assert sure.confidence(math.nan) == 1.0, "not a number, no evidence"


@pytest.mark.parametrize("kind", ["sgd momentum", "rmsprop", "adamw"])
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
        (partial(torch.optim.SGD, lr=1e-3, momentum=0.9), True),
        (partial(torch.optim.SGD, lr=1e-3), False),
        (partial(torch.optim.RMSprop, lr=1e-3), False),
        (partial(torch.optim.Adagrad, lr=1e-3), False),
    ],
)
def test_whether_an_optimizer_tells_its_alignment(optimizer, known):
    p = torch.nn.Parameter(torch.ones(3))
    made = optimizer([p])
    assert tells(made) is known
    for _ in range(2):
        p.grad = torch.ones(3)
        made.step()
    assert (alignment(made) is not None) is known


def test_alignment_is_unknown_before_the_first_step_and_of_unknown_optimizers():
    assert alignment(stepped(KINDS["adamw"], 0)[1]) is None
    assert alignment(stepped(COPIED["adagrad"])[1]) is None
    assert alignment(stepped(KINDS["sgd"])[1]) is None, "no momentum, no memory of the update"
