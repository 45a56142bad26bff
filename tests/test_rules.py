"""Every rule: golden traces that can be checked by eye, and what must hold for any signal."""

import inspect
import math
import random
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import adaptiverl
from adaptiverl.optim.adaptive import AdaptiveOptimizer
from adaptiverl.optim.constants import CONSTANTS
from adaptiverl.optim.controller import Controller
from adaptiverl.optim.hyperparams import get
from adaptiverl.optim.rules import ARGUMENTS, RULES, names, parse_rules, readers, reason
from adaptiverl.optim.signals import LARGEST
from scripts.rules_tables import page

LR_RULES = [r.name for r in RULES if r.argument == "lr_rule" and r.update]
REWARD_RULES = names("reward_rule")
NO_MEMORY = {"memory": math.inf, "max_drift": 1e9}  # the formulas bare


def optimizer(kind: str = "sgd", **arguments) -> torch.optim.Optimizer:
    weight = [torch.nn.Parameter(torch.zeros(1))]
    match kind:
        case "sgd":
            return torch.optim.SGD(weight, **({"lr": 1.0, "momentum": 0.9} | arguments))
        case "adamw":
            return torch.optim.AdamW(weight, **({"lr": 1.0, "weight_decay": 0.01} | arguments))
    return torch.optim.RMSprop(weight, **({"lr": 1.0, "alpha": 0.9} | arguments))


def trace(opt, name: str, signal: str, values: list, **arguments) -> list[float]:
    """What `name` is after each of the signal's values."""
    controller = Controller(opt, **(NO_MEMORY | arguments))
    result = []
    for value in values:
        controller.observe(**{signal: value})
        controller.tick()
        result.append(get(opt.param_groups[0], name))
    return result


HALF = {"up_factor": 2.0, "down_factor": 0.5, "trend_window": 2}
NEIGHBOURS = {"up_factor": 2.0, "down_factor": 0.5, "loss_beta": 0.0}

GOLDEN = [
    # rule, signal, its values, constants → the rate, from 1
    ("loss_decay", "loss", [1, 1, 3], {"loss_k": 1.0, "loss_beta": 0.0}, [1 / 2, 1 / 4, 1 / 16]),
    ("loss_decay", "loss", [1, 3], {"loss_k": 1.0, "loss_beta": 0.5}, [1 / 2, 1 / 6]),
    ("trend", "loss", [5, 4, 4.5, 4.5], HALF, [1, 2, 1, 1]),
    # beta 0 remembers one value and 0.5 four, so that many are compared
    ("trend", "loss", [5, 4, 4.5, 4.5], NEIGHBOURS, [1, 2, 1, 1]),
    ("trend", "loss", [4, 3, 2, 1], NEIGHBOURS | {"loss_beta": 0.5}, [1, 1, 1, 2]),
    ("trend", "loss", [3, 2, 1, 1, 1, 5, 5], HALF | {"trend_window": 3}, [1, 1, 2, 2, 2, 2, 2]),
    ("trend", "loss", [1, 2, 3, 4, 5], HALF | {"trend_window": 3}, [1, 1, 0.5, 0.5, 0.25]),
    ("variance", "loss", [0, 2, 6, 6], {"var_window": 2}, [1, 1, 1 / 4, 1]),
    ("grad_norm", "grad_norm", [1, 1, 4, 1], {}, [1, 1, 1 / 4, 1]),
    ("cyclical", "loss", [0] * 5, {"cycle_length": 4}, [0.6, 0.2, 0.6, 1, 0.6]),
    ("cosine", "loss", [0] * 5, {"cycle_length": 2}, [0.6, 0.2, 0.6, 1, 0.6]),
    (
        "cosine_restart", "loss", [0] * 6, {"cycle_length": 2, "cycle_mult": 2},
        [0.6, 1, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 1],
    ),
    # a drop that brought nothing is taken back, one that helped stays
    (
        "patience", "loss", [1, 1, 1, 1, 1, 0.5, 0.4, 0.3], {"patience": 1, "cooldown": 1},
        [1, 0.5, 1, 1, 0.5, 0.5, 0.5, 0.5],
    ),
    (
        "trend+cyclical", "loss", [4, 3, 2, 1], HALF | {"cycle_length": 4},
        [0.6, 2 * 0.2, 4 * 0.6, 8 * 1],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "signal", "values", "constants", "expected"), GOLDEN)
def test_rate_from_loss_gradient_and_time(rule, signal, values, constants, expected):
    assert trace(optimizer(), "lr", signal, values, lr_rule=rule, **constants) == pytest.approx(
        expected
    )


REWARDED = [
    ("scaling", [0.5, 1, 0.75], {"reward_center": 0.5, "reward_span": 0.5}, [1, 2, 1.5]),
    ("trend", [0, 1, 2, 1], {"trend_window": 2, "reward_up": 2, "reward_down": 0.5}, [1, 2, 4, 2]),
    ("variance", [0, 2, 2], {"var_window": 2}, [1, 1 / 3, 1]),
    ("kelly", [99, 99, -99], {"kelly_gain": 0.5}, [1.5, 2.25, 1.125]),
    ("kelly", [math.atanh(0.5)], {"kelly_gain": 0.2}, [1.1]),
]


@pytest.mark.parametrize(("rule", "values", "constants", "expected"), REWARDED)
def test_rate_from_reward(rule, values, constants, expected):
    got = trace(optimizer(), "lr", "reward", values, reward_rule=rule, reward_beta=0.0, **constants)
    assert got == pytest.approx(expected)


def test_scaling_maps_center_minus_span_to_next_to_nothing():
    got = trace(optimizer(), "lr", "reward", [-1], reward_rule="scaling", reward_beta=0.0)
    assert got == [0.01], "a rate of 0 would learn nothing more"


@pytest.mark.parametrize(
    ("rule", "values", "constants", "expected"),
    [
        ("inverse", [0, 1, 3], {}, [0, 1 / 2, 3 / 4]),
        ("exp", [0, 1, 2], {"loss_a": math.log(2)}, [0, 1 / 2, 3 / 4]),
        ("relative", [2, 1, 2], {"trend_window": 2}, [0.9, 0.91, 0.91 * 0.9]),
        ("normalized", [1, 2, 0.01], {}, [0.9, 0.8, 0.95]),
    ],
)
def test_momentum(rule, values, constants, expected):
    opt = optimizer()
    controller = Controller(opt, momentum_rule=rule, loss_beta=0.0, **NO_MEMORY, **constants)
    got = []
    for value in values:
        controller.observe(loss=value)
        got.append(opt.param_groups[0]["momentum"])
    assert got == pytest.approx(expected)


@pytest.mark.parametrize(("rule", "later"), [("inverse", 2 / 3), ("exp", 1 - math.exp(-2))])
def test_momentum_is_never_0_so_that_rmsprop_keeps_its_buffer(rule, later):
    p = torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.RMSprop([p], lr=1e-2, momentum=0.9)
    controller = Controller(opt, momentum_rule=rule, loss_beta=0.0)
    for loss, momentum in ((-0.1, 1e-15), (2.0, pytest.approx(later))):
        p.grad = torch.ones(3)
        controller.observe(loss=loss)
        assert opt.param_groups[0]["momentum"] == momentum
        opt.step()
    none = optimizer(momentum=0.0)
    controller = Controller(none, momentum_rule=rule)
    controller.observe(loss=2.0)
    assert none.param_groups[0]["momentum"] == 0, "none at first is none"


def test_reward_trend_moves_momentum_too():
    got = trace(optimizer(), "momentum", "reward", [0, 1, 0], reward_rule="trend", trend_window=2)
    assert got == pytest.approx([0.9, 0.91, 0.91 * 0.9])


def test_alpha_and_beta2_remember_longer_when_the_loss_is_noisier():
    """A variance of 2, then of 8: four times the memory."""
    losses = [0, 2, 6, 6]
    got = trace(optimizer("rmsprop"), "alpha", "loss", losses, alpha_rule="stable", var_window=2)
    assert got == pytest.approx([0.9, 0.9, 1 - 0.1 / 4, 0.9])
    opt = optimizer("adamw", betas=(0.5, 0.6))
    controller = Controller(opt, betas_rule="variance", var_window=2, **NO_MEMORY)
    controller.step = 50  # 0.6^50 is nothing, and 0.9^50 is below 0.01
    for loss in losses[:3]:
        controller.observe(loss=loss)
    assert opt.param_groups[0]["betas"] == (0.5, pytest.approx(0.9))


def test_betas_hold_until_adams_bias_correction_has_no_use_for_them():
    """It divides by 1 - beta^t as if beta had never changed: off by more than 1 % before."""
    opt = optimizer("adamw", betas=(0.5, 0.999))
    got = trace(
        opt, "beta1", "loss", range(12, 0, -1), betas_rule=("relative", "variance"), trend_window=2
    )
    assert got[:7] == [0.5] * 7, "0.5^6 is 0.016"
    assert got[7] == pytest.approx(0.51), "0.5^7 is 0.008"
    for t, beta in enumerate(got):
        assert beta == 0.5 or beta**t <= 0.01 + 1e-12


def test_a_beta_grows_no_faster_than_the_correction_allows():
    opt = optimizer("adamw", betas=(0.9, 0.999))
    arguments = {"betas_rule": "relative", "trend_window": 2, "momentum_up": 0.05}
    got = trace(opt, "beta1", "loss", range(80, 0, -1), **arguments)
    assert got[43] == 0.9, "0.9^43 is 0.0108"
    assert got[44] == pytest.approx(0.01 ** (1 / 44)), "0.9^44 is below 0.01: up to there"
    assert got[-1] == pytest.approx(0.01 ** (1 / 79))


def test_weight_decay_falls_while_the_loss_does():
    got = trace(
        optimizer("adamw"), "weight_decay", "loss", [3, 2, 1, 2], wd_rule="trend", trend_window=2
    )
    assert got == pytest.approx([0.01, 0.0095, 0.01 * 0.95**2, 0.01 * 0.95**2 * 1.05])


def test_a_stateful_rule_mean_reverts_and_stays_near():
    opt = optimizer(lr=1.0)
    controller = Controller(opt, reward_rule="kelly", reward_beta=0.0, memory=10.0)
    for _ in range(100):
        controller.observe(reward=99.0)
    assert opt.param_groups[0]["lr"] == pytest.approx(3), "max_drift"
    for _ in range(60):
        controller.observe(reward=0.0)  # a bet of nothing
    assert opt.param_groups[0]["lr"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("rewards", "expected"), [(9, 2 * 0.8), (-9, 0.5 * 1.2)])
def test_nothing_winds_up_behind_a_bound_of_the_rate(rewards, expected):
    """Thirty steps at the bound are left by the first that points the other way."""
    entries: list[dict] = []
    controller = Controller(
        opt := optimizer(), reward_rule="kelly", reward_beta=0.0, min_lr=0.5, max_lr=2.0,
        record=entries.append,
    )  # fmt: skip
    for _ in range(30):
        controller.observe(reward=rewards)
    assert opt.param_groups[0]["lr"] == (2.0 if rewards > 0 else 0.5)
    assert all(entry["old"] != entry["new"] for entry in entries) and len(entries) == 4
    controller.observe(reward=-rewards)
    assert opt.param_groups[0]["lr"] == pytest.approx(expected, rel=0.01)


def test_a_bound_moves_no_ratio_when_a_scheduler_goes_beyond_it():
    opt = optimizer()
    bare = {"reward_rule": "kelly", "reward_beta": 0.0, "memory": math.inf}
    controller = Controller(opt, owns_lr=False, max_lr=4.0, **bare)
    ratios = []
    for rate, reward in [(1.0, 9), (10.0, 9), (10.0, -9), (10.0, 9), (1.0, 9)]:
        opt.param_groups[0]["lr"] = rate
        controller.observe(reward=reward)
        ratios.append(controller.ratio)
    assert ratios == pytest.approx([1.2, 1.2, 0.96, 0.96, 0.96 * 1.2], rel=1e-6)


def test_rules_of_one_momentum_are_joined_in_any_order():
    """What each makes of the base is added; a multiplier is forgotten in the next step."""
    losses = [10, 9, 8, 8.5, 2]
    relative, normalized = {"name": "relative", "trend_window": 2}, "normalized"
    one, other, both, turned = (
        trace(
            optimizer(momentum=0.5), "momentum", "loss", losses, momentum_rule=rule, loss_beta=0.0
        )
        for rule in (relative, normalized, [relative, normalized], [normalized, relative])
    )
    assert one[:3] == pytest.approx([0.5, 0.51, 0.52])
    assert both == turned
    assert both == pytest.approx([a + b - 0.5 for a, b in zip(one, other, strict=True)])


def test_of_a_state_what_other_rules_made_of_a_momentum_is_not_taken_over():
    one = Controller(optimizer(), momentum_rule="relative+normalized", trend_window=2)
    for loss in (3, 2, 1):
        one.observe(loss=loss)
    assert one.values.parts["momentum"].keys() == {"relative", "normalized"}
    other = Controller(optimizer(), momentum_rule="relative", trend_window=2)
    other.load_state_dict(one.state_dict())
    assert other.values.parts["momentum"] == {"relative": one.values.parts["momentum"]["relative"]}
    older = {name: each for name, each in one.state_dict().items() if name != "parts"}
    other.load_state_dict(older)
    assert other.values.parts == {}


# For any signal


def noise(rule: dict[str, str], seed: int) -> tuple[float, float, float, Controller]:
    """10,000 steps: the rate's geometric mean, lowest and highest, over where it began."""
    chance = random.Random(seed)
    opt = optimizer(lr=0.01)
    controller = Controller(opt, **rule)
    rates = []
    for _ in range(10_000):
        controller.observe(
            loss=chance.gauss(0, 1), reward=chance.gauss(0, 1), grad_norm=abs(chance.gauss(0, 1))
        )
        controller.tick()
        rates.append(opt.param_groups[0]["lr"] / 0.01)
    mean = math.exp(sum(map(math.log, rates)) / len(rates))
    return mean, min(rates), max(rates), controller


DRIFTING = ("loss_decay", "kelly")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "rule",
    [{"lr_rule": rule} for rule in LR_RULES if rule not in DRIFTING]
    + [{"reward_rule": rule} for rule in REWARD_RULES if rule not in DRIFTING]
    + [{"lr_rule": "trend+variance+patience"}],
    ids=lambda rule: "-".join(rule.values()),
)
def test_pure_noise_moves_no_rate_for_long(rule, seed):
    mean, low, high, _ = noise(rule, seed)
    assert 0.5 < mean < 2
    assert low > 1e-9 / 0.01 and high < 10 / 0.01, "the bounds"


def by_patience(loss, seed: int, **arguments) -> list[float]:
    """The rate over where it began; `loss(step, ratio, chance)` over 2,000 steps."""
    chance = random.Random(seed)
    opt = optimizer(lr=0.05)
    controller = Controller(opt, lr_rule="patience", **arguments)
    ratios = [1.0]
    for step in range(2000):
        controller.observe(loss=loss(step, ratios[-1], chance))
        controller.tick()
        ratios.append(opt.param_groups[0]["lr"] / 0.05)
    return ratios


def autocorrelated():
    """AR(1) of .9: what looks like a trend is none."""
    last = 0.0

    def loss(step, ratio, chance):
        nonlocal last
        last = 0.9 * last + chance.gauss(0, 1)
        return last

    return loss


def floor_of_rate():
    """A loss that the rate holds up: in some ten steps it follows the rate."""
    level = 1.0

    def loss(step, ratio, chance):
        nonlocal level
        level += 0.1 * (ratio - level)
        return level * (1 + 0.1 * chance.gauss(0, 1))

    return loss


@pytest.mark.parametrize("bounds", [{}, {"min_lr": 1e-9, "max_lr": 1.0}], ids=["free", "bounded"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["improves", "autocorrelated", "plateau"])
def test_patience_drops_on_a_plateau_and_not_on_what_looks_like_one(kind, seed, bounds):
    """A bound of the rate takes max_drift away: it must hold without it, too."""
    loss = {
        "improves": lambda step, ratio, chance: chance.gauss(-0.05 * step, 1),
        "autocorrelated": autocorrelated(),
        "plateau": floor_of_rate(),
    }[kind]
    ratios = by_patience(loss, seed, **bounds)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    if kind == "plateau":
        assert 0.3 < mean < 0.7, "found again and again, while it mean-reverts"
        assert min(ratios) < 0.45, "what helped stays, and a second drop is added"
    else:
        assert mean > (0.85 if kind == "improves" else 0.6)
        assert min(ratios) > 0.2 and max(ratios) == 1.0


@pytest.mark.parametrize("rule", [{"lr_rule": "loss_decay"}, {"reward_rule": "kelly"}])
def test_what_drifts_by_design_stays_within_a_factor_of_three(rule):
    _, low, high, _ = noise(rule, seed=1)
    assert low * 1.0000001 >= 1 / 3 and high <= 3.0000001


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(
    st.lists(st.tuples(numbers, numbers, numbers), max_size=40),
    st.sampled_from(LR_RULES),
    st.sampled_from(REWARD_RULES),
)
def test_bounds_hold_for_any_signal(signals, lr_rule, reward_rule):
    opt = torch.optim.SGD(
        [
            {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-3},
            {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": torch.tensor(2e-3)},
            {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.0},
        ],
        momentum=0.9,
    )
    controller = Controller(
        opt,
        lr_rule=lr_rule,
        reward_rule=reward_rule,
        momentum_rule="inverse",
        min_lr=1e-4,
        max_lr=1e-2,
        max_momentum=0.95,
        **({"trend_window": 2} if "trend" in (lr_rule, reward_rule) else {}),
    )
    own = opt.param_groups[1]["lr"]
    for loss, reward, grad_norm in signals:
        controller.observe(loss=loss, reward=reward, grad_norm=grad_norm)
        controller.tick()
        for group in opt.param_groups[:2]:
            assert 1e-4 * (1 - 1e-6) <= float(group["lr"]) <= 1e-2 * (1 + 1e-6)
            assert 0 <= group["momentum"] <= 0.95
    assert opt.param_groups[1]["lr"] is own, "a tensor is written in place"
    assert opt.param_groups[2]["lr"] == 0, "frozen stays frozen"
    bad = sum(not math.isfinite(x) for row in signals for x in row)
    assert sum(controller.ignored.values()) == bad


@pytest.mark.parametrize(
    "wrong",
    [
        {"kelly_gain": 1.5}, {"kelly_gain": 1.0}, {"kelly_temp": 0}, {"reward_span": 0},
        {"trend_window": 1}, {"trend_window": 2.5}, {"trend_threshold": -1}, {"patience": 0},
        {"cooldown": 0}, {"var_window": 0}, {"var_window": 1}, {"up_factor": 0},
        {"down_factor": -0.5}, {"up_factor": math.nan}, {"reward_up": 0}, {"reward_down": -1},
        {"momentum_up": -0.1}, {"momentum_down": 1.5}, {"wd_up": 0}, {"wd_down": math.inf},
        {"loss_k": -1}, {"loss_a": -1}, {"var_damp_base": 0}, {"var_damp_scale": -1},
        {"grad_power": -1}, {"grad_power": math.inf}, {"big_drop": 0}, {"big_drop": 2},
        {"reward_alpha": -1}, {"reward_center": math.nan}, {"eta_min_scale": -0.1},
        {"eta_min_scale": 1.5}, {"cycle_length": 0}, {"cycle_mult": 0.5}, {"loss_beta": 1},
        {"reward_beta": -0.1}, {"memory": 0}, {"memory": 1}, {"max_drift": 0.5}, {"max_drift": 0},
        {"min_rel_improve": -1}, {"max_lr": 0}, {"min_lr": -1},
        {"max_momentum": 1.1}, {"min_momentum": -1}, {"steps": 0},
    ],
    ids=str,
)  # fmt: skip
def test_what_would_crash_at_the_first_signal_is_refused_at_once(wrong):
    every = {
        "lr_rule": "+".join(LR_RULES),
        "reward_rule": "+".join(REWARD_RULES), "momentum_rule": "relative+exp",
        "betas_rule": "relative+variance", "alpha_rule": "stable", "wd_rule": "trend",
    }  # fmt: skip
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name} is {value}; it must be .*in [\[(].*[\])]$"):
        Controller(optimizer(), **every, **wrong)


def test_bounds_that_cross_are_refused():
    with pytest.raises(ValueError, match="min_lr 2 is above max_lr 1"):
        Controller(optimizer(), min_lr=2.0, max_lr=1.0)
    with pytest.raises(ValueError, match=r"min_momentum 0\.5 is above max_momentum 0\.4"):
        Controller(optimizer(), min_momentum=0.5, max_momentum=0.4)


@pytest.mark.parametrize("name", [n for n in CONSTANTS if readers(n) and n != "trust_region_kl"])
def test_what_no_chosen_rule_reads_is_refused_with_what_reads_it(name, caplog):
    value = 0.75 if CONSTANTS[name].range.endswith((" 1]", " 1)")) else 4
    for rules in ({}, {"alpha_rule": "none"}):
        if name == "cycle_length":  # an example of the documentation has it
            Controller(optimizer(), **rules, **{name: value})
            assert "no chosen rule reads cycle_length; these do: lr_rule cyclical, " in caplog.text
        else:
            with pytest.raises(
                ValueError, match=f"no chosen rule reads {name}; these do: {readers(name)[0]}"
            ):
                Controller(optimizer(), **rules, **{name: value})
    for reader in readers(name):
        argument, rule = reader.split()
        make = AdaptiveOptimizer if rule == "learned" else Controller
        make(optimizer(), **{argument: rule}, **{name: value})


@pytest.mark.parametrize(
    ("kind", "rule", "lacks"),
    [
        ("adamw", {"momentum_rule": "inverse"}, "AdamW has no momentum"),
        ("sgd", {"betas_rule": "relative"}, "SGD has no beta1"),
        ("sgd", {"alpha_rule": "stable"}, "SGD has no alpha"),
        ("sgd", {"wd_rule": "trend"}, "the weight decay is 0"),
        ("plain", {"momentum_rule": "inverse"}, "the momentum is 0"),
    ],
)
def test_a_rule_for_what_the_optimizer_lacks_is_told(kind, rule, lacks, caplog):
    own = optimizer("sgd", momentum=0.0) if kind == "plain" else optimizer(kind, weight_decay=0.0)
    Controller(own, **rule)
    assert caplog.messages == [f"{next(iter(rule))} moves nothing: {lacks}"]


@pytest.mark.parametrize(
    ("rules", "signal"),
    [
        ({"lr_rule": "trend+grad_norm"}, "loss"),
        ({"lr_rule": "trend+patience"}, "loss"),
        ({"lr_rule": "grad_norm"}, "grad_norm"),
        ({"momentum_rule": "inverse"}, "loss"),
        ({"reward_rule": "kelly"}, "reward"),
    ],
)
def test_a_signal_that_never_came_is_missed_once(rules, signal, caplog):
    told, blind = Controller(optimizer(), **rules), Controller(optimizer(), **rules)
    for controller in (told, blind):
        for _ in range(50):
            if controller is told:
                controller.observe(loss=1.0, reward=1.0, grad_norm=1.0)
            controller.tick()
        lines = [r.getMessage() for r in caplog.records]
        if controller is told:
            assert not lines
    assert sum(line.startswith(f"no {signal} was observed in 20 steps") for line in lines) == 1


def test_a_rate_that_is_0_for_ever_is_warned_of_once(caplog):
    controller = Controller(optimizer(lr=0.0), lr_rule="cosine", owns_lr=False)
    for _ in range(30):
        controller.tick()
    assert [r.getMessage()[:25] for r in caplog.records] == ["the learning rate is stil"]


def test_a_scheduler_takes_over_a_rate_that_has_risen_from_0():
    opt = optimizer(lr=0.0)
    controller = Controller(opt, lr_rule="loss_decay", loss_k=1.0, loss_beta=0.0, **NO_MEMORY)
    controller.observe(loss=0.0)
    opt.param_groups[0]["lr"] = 1.0
    controller.observe(loss=1.0)
    assert opt.param_groups[0]["lr"] == 0.5


@given(st.lists(numbers, max_size=30))
def test_none_is_the_identity(signals):
    opt = optimizer("adamw", lr=1e-3)
    before = {k: v for k, v in opt.param_groups[0].items() if k != "params"}
    entries: list[dict] = []
    controller = Controller(opt, record=entries.append)
    for x in signals:
        controller.observe(loss=x, reward=x, grad_norm=x)
        controller.tick()
    assert {k: v for k, v in opt.param_groups[0].items() if k != "params"} == before
    assert controller.inert and not entries


def test_nan_changes_nothing_and_is_counted():
    opt = optimizer()
    controller = Controller(opt, lr_rule="loss_decay", loss_k=1.0, **NO_MEMORY)
    for loss in (1.0, math.nan, -math.inf, 1.1e150, 1e200, -1e308, 1.0):
        controller.observe(loss=loss)
    assert opt.param_groups[0]["lr"] == 1 / 4
    assert controller.ignored["loss"] == 5


@pytest.mark.parametrize("signs", [(1,), (1, -1), (1, 0, 0)])
def test_the_largest_signals_raise_nothing(signs):
    opt = optimizer()
    rules = {"lr_rule": "+".join(LR_RULES), "reward_rule": "+".join(REWARD_RULES)}
    small = {"trend_window": 3, "var_window": 2, "patience": 2, "cooldown": 3}
    controller = Controller(
        opt, **rules, momentum_rule="inverse+exp+relative+normalized", wd_rule="trend", **small
    )
    for step in range(40):
        x = LARGEST * signs[step % len(signs)]
        controller.observe(loss=x, reward=x, grad_norm=abs(x))
        controller.tick()
        assert 1e-9 <= opt.param_groups[0]["lr"] <= 10
    assert not any(controller.ignored.values())


def test_a_whole_number_may_be_given_as_a_float():
    given = {"patience": 3e1, "var_window": 20.0, "trend_window": 1e12, "cooldown": 5.0}
    asked = {"lr_rule": "trend+variance+patience", "steps": 50.0, **given}
    own = {"name": "patience", "patience": 2.0}
    for arguments, patience in ((asked, 30), ({"lr_rule": own}, 2)):
        controller = Controller(optimizer(), **arguments)
        for _ in range(100):
            controller.observe(loss=1.0)
        constants = controller.rules[-1].constants
        assert constants.patience == patience
        for name in ("patience", "var_window", "cooldown"):
            assert type(getattr(constants, name)) is int
    assert Controller(optimizer(), **asked).rules[0].constants.trend_window == 10**12
    assert type(Controller(optimizer(), **asked).steps) is int
    with pytest.raises(ValueError, match=r"^patience is 2\.5; it must be a whole number in"):
        Controller(optimizer(), lr_rule=own | {"patience": 2.5})


def test_of_a_state_other_rules_are_not_taken_over():
    """Nothing would move their factor on the rate any more."""
    old = Controller(optimizer(), lr_rule="loss_decay+cosine", reward_rule="kelly", owns_lr=False)
    for _ in range(5):
        old.observe(loss=9.0, reward=9.0)
        old.tick()
    assert len(old.ratios) == 3 and set(old.seen) == {"loss", "reward"}
    new = Controller(optimizer(), lr_rule="loss_decay", owns_lr=False)
    new.load_state_dict(old.state_dict())
    assert new.ratios == {"loss_decay": old.ratios["loss_decay"]} and new.step == 5
    assert new.seen == {"loss": old.seen["loss"]}
    bare = Controller(optimizer(), owns_lr=False)
    bare.load_state_dict(old.state_dict())
    assert bare.ratio == 1 and not bare.seen


@pytest.mark.parametrize("name", ["min_lr", "max_lr"])
def test_bounds_of_a_rate_that_no_rule_moves_are_refused(name):
    for rules in ({"wd_rule": "trend"}, {"momentum_rule": "inverse"}):
        with pytest.raises(ValueError, match=f"^{name} bounds the rate, and no rule that is"):
            Controller(optimizer("adamw"), **rules, **{name: 1.0})
    for rules in ({}, {"reward_rule": "kelly"}, {"lr_rule": "trend"}):
        assert 1.0 in Controller(optimizer(), **rules, **{name: 1.0}).bounds["lr"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_rule": "trnd"}, "lr_rule: there is no rule 'trnd'; the nearest is 'trend'"),
        ({"lr_rule": "trend+kelly"}, "lr_rule: there is no rule 'kelly'"),
        ({"reward_rule": "loss_decay"}, "reward_rule: there is no rule 'loss_decay'"),
        ({"betas_rule": "trend"}, "betas_rule: there is no rule 'trend'"),
        ({"lr_rule": "trend+trend"}, "lr_rule: 'trend' is named twice"),
        (
            {"lr_rule": "trust_region"},
            "lr_rule trust_region needs a KL, which AdaptiveOptimizer measures",
        ),
        ({"loss_bet": 0.5}, "there is no argument 'loss_bet'; loss_beta is near"),
        ({"loss_beta": "0.5"}, "loss_beta is '0.5'; it must be a number"),
        ({"lr_rule": "trend", "max_lr": 0.5}, "the rate 1 is outside its bounds"),
        ({"up": 2.0}, "up"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Controller(optimizer(), **arguments)


def test_each_change_has_its_reason():
    entries: list[dict] = []
    controller = Controller(
        optimizer(), lr_rule="loss_decay", loss_k=1.0, record=entries.append, **NO_MEMORY
    )
    controller.observe(loss=1.0)
    assert entries == [
        {"step": 0, "hyperparameter": "lr", "rule": "loss_decay", "signal": "loss", "value": 1.0,
         "old": 1.0, "new": 0.5}
    ]  # fmt: skip


def test_a_value_that_returns_to_its_base_is_not_said_to_be_moved_by_the_rule():
    entries: list[dict] = []
    controller = Controller(
        optimizer(), reward_rule="trend", trend_window=2, memory=10.0, record=entries.append
    )
    for reward in (0, 1, 1, 1):
        controller.observe(reward=reward)
    said = [(entry["hyperparameter"], entry["rule"]) for entry in entries]
    assert said == [
        ("lr", "reward trend"), ("momentum", "reward trend"),
        *[("lr", "mean reversion"), ("momentum", "mean reversion")] * 2,
    ]  # fmt: skip
    assert reason("mean reversion", "momentum").startswith("no rule acted")


def test_records_and_properties_are_about_the_first_group_that_has_the_hyperparameter():
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1))], "momentum": momentum}
        for momentum in (0.0, 0.9)
    ]
    entries: list[dict] = []
    opt = AdaptiveOptimizer(
        torch.optim.SGD(groups, lr=1.0), momentum_rule="normalized", loss_beta=0.0,
        record=entries.append,
    )  # fmt: skip
    for loss in (1, 2):
        opt.step_loss(loss)
    assert [(entry["old"], entry["new"]) for entry in entries] == [(0.9, pytest.approx(0.8))]
    assert opt.momentum == pytest.approx(0.8) and opt.param_groups[0]["momentum"] == 0.0


def test_constants_may_be_given_with_their_rule():
    """Two rules of the same signal read it with windows of their own."""
    opt = optimizer("adamw")
    rules = [{"name": "trend", "trend_window": 2, "up_factor": 2.0}, "cyclical"]
    controller = Controller(
        opt, lr_rule=rules, wd_rule="trend", trend_window=3, cycle_length=4, **NO_MEMORY
    )
    got = []
    for loss in (4.0, 3.0, 2.0):
        controller.observe(loss=loss)
        controller.tick()
        got.append((opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]))
    assert [rate for rate, _ in got] == pytest.approx([0.6, 2 * 0.2, 4 * 0.6])
    assert [decay for _, decay in got] == pytest.approx([0.01, 0.01, 0.0095])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "patience", "patience": 0}, "patience is 0; it must be a whole number in"),
        ({"name": "patience", "up_factor": 2}, "patience does not read 'up_factor'; it reads big"),
        ({"patience": 3}, "{'patience': 3} names no rule; a rule is a name, like"),
        (3, "3 names no rule; a rule is a name, like"),
        ([None], "None names no rule; a rule is a name, like"),
        ([{"name": "trend"}, "patience+trend"], "'trend' is named twice"),
        ({"name": "learned", "grad_power": 1}, "learned does not read 'grad_power'"),
    ],
)
def test_constants_with_a_rule_are_checked(value, message):
    with pytest.raises(ValueError, match=message):
        parse_rules("lr_rule", value)


def test_what_a_rule_argument_may_be():
    rule, constants = parse_rules("lr_rule", {"name": "patience", "patience": 30})[0]
    assert (rule.name, rule.reads, constants) == ("patience", "loss", {"patience": 30})
    for mixed in ("none+trend", "trend+none", ["none", "trend"], {"name": "none", "patience": 3}):
        with pytest.raises(ValueError, match='lr_rule: "none" is no rule, and stands alone'):
            parse_rules("lr_rule", mixed)
    assert parse_rules("lr_rule", "none") == parse_rules("lr_rule", []) == []
    both = parse_rules("betas_rule", ("relative", "variance"))
    assert [rule.moves for rule, _ in both] == ["beta1", "beta2"] and all(not c for _, c in both)
    assert [rule.moves for rule, _ in parse_rules("reward_rule", "trend")] == ["lr", "momentum"]


def test_every_rule_has_a_reason_and_constants_that_exist():
    for rule in RULES:
        assert rule.argument in ARGUMENTS and set(rule.constants) <= set(CONSTANTS)
        assert reason(rule.label, rule.moves) == rule.reason != ""
    assert "went too far" in reason("line_search") and "short" in reason("line_search up")


def test_rules_need_no_torch():
    """A config is checked before torch is loaded."""
    code = "import sys, adaptiverl.optim.rules, adaptiverl.optim.signals; assert 'torch' not in "
    subprocess.run([sys.executable, "-c", code + "sys.modules"], cwd=ROOT, check=True)


def test_betas_that_would_hold_for_the_whole_run_are_refused_with_the_figure(caplog):
    """0.999^4603 is the first below 0.01, and 0.9^44."""
    arguments = {"betas_rule": ("relative", "variance")}
    with pytest.raises(ValueError, match=r"betas_rule variance moves nothing in the first 4,603"):
        Controller(optimizer("adamw"), steps=4603, **arguments)
    with pytest.raises(ValueError, match=r"betas_rule relative moves nothing in the first 44 "):
        Controller(optimizer("adamw"), steps=44, betas_rule="relative")
    assert not caplog.records
    Controller(optimizer("adamw"), steps=4604, **arguments)
    Controller(optimizer("adamw", betas=(0.9, 0.9)), **arguments)
    assert not caplog.records
    Controller(optimizer("sgd"), steps=10, **arguments)  # has none
    Controller(optimizer("adamw"), **arguments)  # of unknown length
    assert "moves nothing in the first 4,603 steps" in caplog.text


def test_another_writer_of_the_rate_is_refused():
    opt = optimizer()
    controller = Controller(opt, lr_rule="trend")
    controller.observe(loss=1.0)
    opt.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="something else sets it"):
        controller.observe(loss=1.0)


def test_a_new_group_begins_where_it_is():
    opt = optimizer()
    controller = Controller(opt, lr_rule="loss_decay", loss_k=1.0, loss_beta=0.0, **NO_MEMORY)
    controller.observe(loss=1.0)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 4.0})
    controller.observe(loss=0.0)
    assert [group["lr"] for group in opt.param_groups] == [0.5, 2.0], "base 4, ratio a half"


def test_the_page_of_rules_is_the_one_that_the_rules_write():
    text = (ROOT / "docs/rules.md").read_text(encoding="utf-8")
    assert page(text) == text, "run `make docs`"


@pytest.mark.parametrize(
    "name",
    ["AdaptiveOptimizer", "AdaptiveScheduler", "RewardAdaptiveScheduler", "Controller"],
)
def test_help_lists_every_argument(name):
    text = inspect.getdoc(getattr(adaptiverl, name)) or ""
    for argument in (*ARGUMENTS, *CONSTANTS):
        assert f"\n{argument}: " in text or f"\n{argument} = " in text, argument
    own = inspect.signature(getattr(adaptiverl, name)).parameters.values()
    for parameter in own:
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "last_epoch":
            assert re.search(rf"\b{parameter.name}\b", text), parameter.name
