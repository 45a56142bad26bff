"""OnlineSGD, OnlineRMSProp, OnlineAdamW and the rule "learned": torch's own, scaled by a GRU."""

import copy
import io
import math
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, without_clock
from test_adaptive import LOOPS
from test_adaptive import model as small_model
from torch import nn

from adaptiverl import AdaptiveOptimizer, OnlineAdamW, OnlineRMSProp, OnlineSGD
from adaptiverl.optim.online import learned, recurrent
from adaptiverl.optim.online import optimizers as online
from adaptiverl.optim.online.dynamics import dynamics
from adaptiverl.optim.online.learned import LearnedRate
from adaptiverl.optim.update import LastUpdate, alignment
from adaptiverl.training.metrics import dynamics_lines

PAIRS = [
    (OnlineSGD, torch.optim.SGD, {"momentum": 0.9}),
    (OnlineRMSProp, torch.optim.RMSprop, {"momentum": 0.9}),
    (OnlineAdamW, torch.optim.AdamW, {"fused": True}),
]
MORE = [
    (OnlineSGD, torch.optim.SGD, {}),
    (OnlineSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (OnlineSGD, torch.optim.SGD, {"fused": True}),
    (OnlineRMSProp, torch.optim.RMSprop, {"centered": True, "weight_decay": 0.1}),
    (OnlineAdamW, torch.optim.AdamW, {}),
    (OnlineAdamW, torch.optim.AdamW, {"fused": True, "amsgrad": True, "weight_decay": 0.1}),
    (OnlineAdamW, torch.optim.AdamW, {"amsgrad": True, "weight_decay": 0.1}),
    (OnlineAdamW, torch.optim.AdamW, {"lr": torch.tensor(0.01), "weight_decay": 0.1}),
    (OnlineAdamW, torch.optim.AdamW, {"lr": torch.tensor(0.01), "fused": True}),
    (OnlineAdamW, torch.optim.AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64)}),
    (OnlineSGD, torch.optim.SGD, {"lr": torch.tensor(0.01), "momentum": 0.9}),
    (OnlineRMSProp, torch.optim.RMSprop, {"lr": torch.tensor(0.01), "momentum": 0.9}),
]
each = pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 3))


def backward(model: nn.Module, step: int) -> float:
    """The loss of batch `step`, its gradient in .grad."""
    chance = torch.Generator().manual_seed(step)
    x = torch.randn(16, 40, generator=chance)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.item()


def lively(optimizer: online.Online, size: float = 1.0) -> online.Online:
    """With a head that is not zero."""
    chance = torch.Generator().manual_seed(1)
    weights = dict(optimizer.weights)
    weights["head"] = size * torch.randn(recurrent.HIDDEN, generator=chance)
    optimizer.place(weights)
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        loss = backward(model, step)
        optimizer.step()
        if isinstance(optimizer, online.Online):
            optimizer.observe(
                loss=loss, reward=-loss, kl=0.01, trust_region_kl=0.004, done=step / 100
            )


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# Torch's own


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS + MORE)
def test_with_a_head_of_zeros_it_is_torchs_own_bit_for_bit(ours, theirs, arguments):
    """100 steps, and the GRU looks on: only its head, which does not learn here, is zero."""
    one, other, arguments = net(), net(), {"lr": 0.01} | arguments
    train(one, ours(one.named_parameters(), weights=None, learn=False, **arguments),
          range(100))  # fmt: skip
    train(other, theirs(other.parameters(), **arguments), range(100))
    assert all(map(torch.equal, one.parameters(), other.parameters()))


@each
def test_each_tensors_update_is_torchs_times_its_scale(ours, theirs, arguments):
    """Against torch's optimizer with a group a tensor, at the rates that were taken."""
    one, other = net(), net()
    optimizer = lively(ours(one.named_parameters(), lr=0.01, **arguments))
    reference = theirs([{"params": [p]} for p in other.parameters()], lr=0.01, **arguments)
    for step in range(20):
        backward(one, step)
        backward(other, step)
        optimizer.step()
        for group, scale in zip(reference.param_groups, optimizer.last["scale"], strict=True):
            group["lr"] = 0.01 * scale.exp().item()
        reference.step()
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    scales = optimizer.last["scale"]
    assert scales.abs().max() > 0.05, "they do differ"
    assert scales.mean().abs() < 1e-6, "centred: the rate as a whole is another's"
    assert scales.abs().max() <= 2 * recurrent.MAX_LOG_SCALE


def test_it_is_a_torch_optimizer_for_everyone_else():
    """A scheduler's rate times the scale; hooks run once; the scheduler sees its own rate."""
    model = net()
    optimizer = OnlineAdamW(model.parameters(), lr=0.01, weights=None, learn=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).step()  # torch wraps its step then
    seen = []
    optimizer.register_step_pre_hook(lambda own, *_: seen.append(own.param_groups[0]["lr"]))
    for step in range(3):
        backward(model, step)
        optimizer.step()
        scheduler.step()
    assert seen == [0.01, 0.005, 0.0025]
    assert isinstance(optimizer, torch.optim.AdamW) and len(optimizer.param_groups) == 1
    assert optimizer.names == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize("loop", LOOPS)
@each
def test_in_other_peoples_loops_it_is_torchs_own_too(ours, theirs, arguments, loop):
    """GradScaler, accelerate and HF Trainer's `optimizers=`, with a scheduler of the rate."""
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    ends = []
    for kind, more in ((ours, {"weights": None, "learn": False}), (theirs, {})):
        model = small_model()
        optimizer = kind(model.parameters(), lr=0.01, **arguments, **more)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
        LOOPS[loop](model, optimizer, schedule)
        kept = [x for p in model.parameters() for x in optimizer.state[p].values()]
        ends.append(weights_of(model) + kept)
    for one, other in zip(*ends, strict=True):  # moments too: Adam's step forgives a scale
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@each
@pytest.mark.parametrize("why", ["frozen", "no gradient"])
def test_tensors_that_are_not_trained_take_no_part(ours, theirs, arguments, why):
    """LoRA given all parameters: those that are trained do what they do alone."""
    ends = []
    for whole in (True, False):
        model = net()
        still = [(n, p) for n, p in model.named_parameters() if n in ("1.weight", "1.bias")]
        for _, p in still:
            p.requires_grad_(why == "no gradient")
        named = list(model.named_parameters())
        if not whole:
            named = [(n, p) for n, p in named if n not in ("1.weight", "1.bias")]
        optimizer = lively(ours(named, lr=0.01, **arguments))
        kept = [n not in ("1.weight", "1.bias") for n, _ in named]
        place = torch.tensor([-0.5, -0.4, 0.0, 0.0, 0.4, 0.5] if whole else [-0.5, -0.4, 0.4, 0.5])
        optimizer._fixed[:, 0] = place  # their depth, as if there were as many
        for step in range(12):
            backward(model, step)
            for _, p in still:
                p.grad = None
            optimizer.step()
        scale = optimizer.last["scale"]
        assert scale[torch.tensor(kept)].mean().abs() < 1e-6, "centred over those that move"
        assert not scale[~torch.tensor(kept)].any()
        ends.append(weights_of(model))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


def test_groups_without_parameters_are_no_mistake():
    model = net()
    groups = [{"params": []}, {"params": list(model.parameters())}]
    optimizer = OnlineAdamW(groups, lr=0.01)
    train(model, optimizer, range(2))
    with pytest.raises(ValueError, match="none of its groups has a parameter"):
        OnlineAdamW([{"params": []}], lr=0.01)


@each
def test_a_rate_that_groups_share_is_scaled_once(ours, theirs, arguments):
    model = net()
    parameters, rate = list(model.parameters()), torch.tensor(0.01)
    groups = [{"params": part, "lr": rate} for part in (parameters[:3], parameters[3:])]
    arguments = {k: v for k, v in arguments.items() if k != "fused"}
    base = ours(groups, weights=None, learn=False, **arguments)
    optimizer = AdaptiveOptimizer(base, "cyclical", cycle_length=4, eta_min_scale=0.5)
    for factor in (1.0, 0.75, 0.5):
        backward(model, 0)
        optimizer.step()
        assert [r.item() for r in base.rates.values()] == pytest.approx([0.01 * factor] * 6)
    assert rate.item() == pytest.approx(0.01)


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_as_the_original_does(ours, theirs, arguments, copied):
    model = net()
    optimizer = lively(ours(model.named_parameters(), lr=0.01, **arguments))
    train(model, optimizer, range(5))
    other, twin = copied((model, optimizer))
    train(model, optimizer, range(5, 12))
    train(other, twin, range(5, 12))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("name", ["hidden", "last", "weights"])
def test_a_state_of_other_shapes_is_refused(name):
    model = net()
    state = OnlineAdamW(model.parameters()).state_dict()
    if name == "hidden":
        state["online"]["hidden"] = torch.zeros(6, 3)
    else:
        part = next(iter(state["online"][name]))
        state["online"][name] = state["online"][name] | {part: torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=rf"the state does not fit: {name}.* is \[.*\] there"):
        OnlineAdamW(model.parameters()).load_state_dict(state)


def test_moments_of_other_shapes_are_refused():
    """The names are the same where there are none: 0, 1, …"""
    model, wide = net(), nn.Sequential(nn.Linear(40, 32), nn.LayerNorm(32), nn.Linear(32, 3))
    optimizer = OnlineAdamW(model.parameters())
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match=r"does not fit: exp_avg of 0 is \[64, 40\] there"):
        OnlineAdamW(wide.parameters()).load_state_dict(optimizer.state_dict())


def test_rules_of_the_whole_rate_come_by_wrapping():
    model = net()
    before = weights_of(model)
    base = OnlineSGD(model.parameters(), lr=1.0, weights=None)
    optimizer = AdaptiveOptimizer(
        base, "loss_decay", loss_k=1.0, loss_beta=0.0, memory=math.inf, max_drift=1e9, steps=4
    )
    backward(model, 0)
    optimizer.observe(loss=1.0)
    optimizer.step(measure_kl=lambda: 0.04)
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * p.grad)
    assert base.param_groups[0]["lr"] == 1.0
    optimizer.observe(loss=3.0, reward=math.nan)
    assert base.signals == pytest.approx([math.log(2.5) / 2, 0.0, 1.8 / 1.1, -0.25], rel=1e-6), (
        "it sees the signals too: KL over its target, no reward, the loss, the share done"
    )


def test_complex_weights_and_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="does not support complex parameters"):
        OnlineSGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1)
    net = nn.Embedding(4, 2, sparse=True)
    net(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        OnlineSGD(net.parameters(), lr=0.1).step()


@pytest.mark.parametrize("learn", ["no", 1, None])
def test_whether_it_learns_is_true_or_false(learn):
    with pytest.raises(TypeError, match=f"^learn is {learn!r}; it must be True or False$"):
        OnlineAdamW([torch.nn.Parameter(torch.ones(1))], learn=learn)


def test_wrong_arguments_are_refused():
    model = net()
    optimizer = OnlineSGD(model.parameters(), lr=1.0)
    with pytest.raises(TypeError, match="lr_ruel"):
        OnlineSGD(model.parameters(), lr=1.0, weights=None, lr_ruel="trend")
    with pytest.raises(ValueError, match="foreach cannot take each tensor's rate"):
        OnlineAdamW(model.parameters(), foreach=True)
    with pytest.raises(ValueError, match="all of its tensors at the beginning"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


@each
def test_the_trust_region_knows_its_updates(ours, theirs, arguments):
    """Scaled back against weights that were kept; nothing is copied for AdamW."""
    model = net()
    optimizer = lively(ours(model.named_parameters(), lr=0.01, **arguments))
    train(model, optimizer, range(5))
    backward(model, 5)
    assert alignment(optimizer) is not None
    before, update = weights_of(model), LastUpdate(optimizer)
    assert bool(update.old) == (theirs is not torch.optim.AdamW)
    optimizer.step()
    after = weights_of(model)
    update.rescale(0.25)
    for p, old, new in zip(model.parameters(), before, after, strict=True):
        torch.testing.assert_close(p.detach(), old.lerp(new, 0.25), rtol=1e-5, atol=1e-6)


# The GRU


def test_the_hidden_state_matters():
    """The same gradients and features, another past, another scale."""
    model = net()
    optimizer = lively(OnlineAdamW(model.named_parameters()))
    train(model, optimizer, range(5))
    scales = []
    for hidden in (optimizer.hidden, torch.zeros_like(optimizer.hidden)):
        x = optimizer.last["x"]
        scales.append(recurrent.answer(optimizer.weights, x, hidden, torch.ones(len(x)))[0])
    assert (scales[0] - scales[1]).abs().max() > 0.01


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each
def test_bad_gradients_leave_it_finite(ours, theirs, arguments, bad):
    model = net()
    optimizer = lively(ours(model.named_parameters(), lr=1e-3, **arguments))
    train(model, optimizer, range(3))
    backward(model, 3)
    for p in list(model.parameters())[:2]:
        p.grad.view(-1)[0] = bad
    optimizer.step()
    train(model, optimizer, range(4, 7))
    finite = [optimizer.hidden, optimizer.last["scale"], *optimizer.weights.values()]
    assert all(tensor.isfinite().all() for tensor in finite)


def test_learning_raises_the_scale_of_what_gains():
    weights = anchor = recurrent.fresh(online.FEATURES)
    x, hidden = torch.randn(3, online.FEATURES), torch.zeros(3, recurrent.HIDDEN)
    gain, among = torch.tensor([0.2, 0.0, -0.2]), torch.ones(3)
    for _ in range(20):
        weights = recurrent.learn(weights, anchor, x, hidden, gain, among)
    scale, _ = recurrent.answer(weights, x, hidden, among)
    assert scale[0] > 0.01 > -0.01 > scale[2]
    before = recurrent.answer(anchor, x, hidden, among)[0]
    assert torch.equal(before, torch.zeros(3)), "from exactly nothing"
    idle = recurrent.learn(weights, anchor, x, hidden, torch.zeros(3), among)
    assert sum((idle[k] - anchor[k]).square().sum() for k in anchor) < sum(
        (weights[k] - anchor[k]).square().sum() for k in anchor
    ), "without gain it goes back to where it started"


def test_its_gradient_is_the_hypergradient():
    """∂L/∂log s of the next loss, against the loss itself with a scale a little larger."""
    model = net()
    optimizer = OnlineSGD(model.named_parameters(), lr=0.01, weights=None)
    backward(model, 0)
    optimizer.step()
    base, start = weights_of(model), net()
    update = [old - new for old, new in zip(start.parameters(), base, strict=True)]
    backward(model, 1)
    predicted = [
        -(p.grad * u).sum().item() for p, u in zip(model.parameters(), update, strict=True)
    ]

    def loss_at(i: int, more: float) -> float:
        with torch.no_grad():
            for k, (p, kept) in enumerate(zip(model.parameters(), base, strict=True)):
                p.copy_(kept - (math.exp(more) - 1) * update[k] if k == i else kept)
        return backward(model, 1)

    for i in (0, 4):  # the two matrices
        measured = (loss_at(i, 0.1) - loss_at(i, -0.1)) / 0.2
        assert measured == pytest.approx(predicted[i], rel=0.05)
    loss_at(-1, 0.0)
    gradient = optimizer.sample([p.grad for p in model.parameters()])
    rows = optimizer.sample([u.detach() for u in update])
    gain = (gradient * rows).sum(1)
    assert [math.copysign(1, g) for g in gain[[0, 4]]] == [
        math.copysign(1, -predicted[i]) for i in (0, 4)
    ], "what it learns from is minus that, of a sample"


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("rate", "cosine"), [(0.1, 1.0), (0.9, -1.0)])
def test_it_sees_whether_its_updates_lead_downhill(rate, cosine, maximize):
    """x²: a step of 0.1 · 2x goes down, and down again; one of 0.9 · 2x across, and back again.

    With maximize it is −x² and uphill.
    """
    weight = nn.Parameter(torch.ones(64))
    optimizer = OnlineSGD([weight], lr=rate, maximize=maximize, weights=None, learn=False)
    for expected in (0.0, cosine):
        optimizer.zero_grad()
        (weight.square().sum() * (-1 if maximize else 1)).backward()
        optimizer.step()
        seen = optimizer.last["cosine"].item() / (1 - online.BETA)
        assert seen == pytest.approx(expected, abs=1e-5)


def test_nothing_is_fetched_from_the_device_in_a_step(monkeypatch):
    """On a GPU each would wait for it; test_gpu_training.py asks the device itself."""
    for ours, _, arguments in PAIRS:
        model = net()
        optimizer = lively(ours(model.named_parameters(), lr=1e-3, **arguments))
        train(model, optimizer, range(2))
        backward(model, 2)
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "cpu"):
                patch.setattr(
                    torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} in a step")
                )
            optimizer.step()


def test_its_state_is_small():
    """At most 1 MB beside torch's, on as many tensors as GPT-2 has."""
    model = nn.ModuleList([nn.Linear(300, 300) for _ in range(74)])
    optimizer = OnlineAdamW(model.parameters())
    state = optimizer.state_dict()["online"]
    held = [state["hidden"], *(t for k in ("weights", "anchor", "last") for t in state[k].values())]
    assert len(optimizer.tensors) == 148
    assert sum(t.numel() * t.element_size() for t in held) < 1e6


# What is kept


@each
def test_it_goes_on_bit_for_bit_from_its_state(ours, theirs, arguments):
    whole = net()
    train(whole, lively(ours(whole.named_parameters(), lr=0.01, **arguments)), range(20))

    part = net()
    optimizer = lively(ours(part.named_parameters(), lr=0.01, **arguments))
    train(part, optimizer, range(8))
    file = io.BytesIO()
    torch.save({"model": part.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = net(seed=1)
    again.load_state_dict(saved["model"])
    optimizer = ours(again.named_parameters(), lr=0.01, **arguments)
    optimizer.load_state_dict(saved["optimizer"])
    train(again, optimizer, range(8, 20))
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


def test_another_set_of_parameters_or_version_is_refused():
    model = net()
    state = OnlineAdamW(model.named_parameters()).state_dict()
    renamed = [(name.replace("3.", "head."), p) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=r"of other tensors: 3\.weight there, head\.weight here"):
        OnlineAdamW(renamed).load_state_dict(state)
    with pytest.raises(ValueError, match=r"of other tensors: 3\.bias there, none here"):
        OnlineAdamW(list(model.named_parameters())[:5]).load_state_dict(state)
    state["online"]["version"] = 0
    with pytest.raises(ValueError, match="of version 0, this program reads 2"):
        OnlineAdamW(model.named_parameters()).load_state_dict(state)


def test_torchs_own_state_can_be_taken_over():
    """A run that began with torch.optim.AdamW goes on with OnlineAdamW."""
    model = net()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, plain, range(3))
    optimizer = OnlineAdamW(model.parameters(), lr=0.01)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state[next(model.parameters())]["step"] == 3


def test_dynamics_are_reported_as_the_document_shows_them():
    model = net()
    optimizer = OnlineAdamW(model.named_parameters(), weights=None)
    train(model, optimizer, range(2))
    rows = dynamics(optimizer)
    assert [row["name"] for row in rows] == [name for name, _ in model.named_parameters()]
    first = next(model.parameters())
    assert rows[0]["exp_avg_norm"] == pytest.approx(optimizer.state[first]["exp_avg"].norm().item())
    assert rows[0]["hidden_norm"] == pytest.approx(optimizer.hidden[0].norm().item())
    told = {"tensor": 0, "name": "h.0.weight", "grad_signal": 0.0123, "hidden_norm": 1.5231,
            "delta_scale": 0.9732, "exp_avg_norm": 0.2103, "exp_avg_sq_mean": 0.000012}  # fmt: skip
    assert dynamics_lines("OnlineAdamW", 100, [told]) == (
        "[OnlineAdamW] Step 100 dynamics:\n"
        "  Tensor 0 | grad_signal=0.0123 | hidden_norm=1.5231 | delta_scale=0.9732 | h.0.weight\n"
        "  exp_avg_norm=0.2103 exp_avg_sq_mean=0.000012"
    )


# The rule "learned"


def fresh_rule() -> LearnedRate:
    rule = LearnedRate()
    rule.place(recurrent.fresh(learned.FEATURES))
    return rule


def test_the_learned_rule_with_a_head_of_zeros_changes_nothing():
    rule = fresh_rule()
    for step in range(20):
        rule.observe(loss=1.0 / (step + 1), reward=float(step))
        rule.observe_update(0.1, 0.004)
        rule.tick()
    assert rule.ratio == 1.0


@pytest.mark.parametrize(("cosine", "up"), [(0.3, True), (-0.3, False)])
def test_the_learned_rule_learns_from_gradients_that_agree(cosine, up):
    rule = fresh_rule()
    for _ in range(100):
        rule.observe(loss=1.0)
        rule.observe_update(0.004, 0.004, cosine)
        rule.tick()
    assert (rule.ratio > 1.2) if up else (rule.ratio < 0.8)
    assert 1 / learned.MAX_RATIO <= rule.ratio <= learned.MAX_RATIO


def test_the_learned_rule_stays_while_no_kl_is_measured():
    rule = LearnedRate()
    for step in range(20):
        rule.observe(loss=float(step % 3), reward=float(step))
        rule.tick()
    assert rule.ratio == 1.0
    rule.observe_update(0.04, 0.004)
    rule.tick()
    assert rule.ratio != 1.0


def test_the_learned_rule_goes_on_from_its_state():
    def run(rule: LearnedRate, steps: range) -> list[float]:
        rates = []
        for step in steps:
            rule.observe(loss=math.sin(step), reward=math.nan)
            rule.observe_update(0.01 * (1 + step % 3), 0.004, 0.1)
            rule.tick()
            rates.append(rule.ratio)
        return rates

    whole = run(LearnedRate(), range(20))
    part, again = LearnedRate(), LearnedRate()
    run(part, range(8))
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert run(again, range(8, 20)) == whole[8:]


def test_weights_came_with_it():
    for name, features in (("tensors", online.FEATURES), ("rate", learned.FEATURES)):
        weights, like = recurrent.trained(name), recurrent.fresh(features)
        assert {k: w.shape for k, w in weights.items()} == {k: w.shape for k, w in like.items()}
    assert recurrent.ASSETS.stat().st_size < 100_000
    assert LearnedRate().weights.keys() == recurrent.trained("rate").keys()


# In the program


@pytest.mark.parametrize("optim", ["online_sgd", "online_rmsprop", "online_adamw"])
def test_a_run_resumes_exactly_and_tells_its_dynamics(settings, main, capsys, optim):
    out = Path(settings["OUTPUT_DIR"])
    keys = settings | {"OPTIM": optim, "STEPS": 6, "DYNAMICS_EVERY": 2, "SAVE_EVERY": 3}
    assert main(keys) == 0
    said = capsys.readouterr().out
    name = {"online_sgd": "SGD", "online_rmsprop": "RMSProp", "online_adamw": "AdamW"}[optim]
    assert f"[Online{name}] Step 2 dynamics:\n  Tensor 0 | grad_signal=" in said
    shutil.copytree(out, f"{out}-whole")
    for later in ("final", "step-000006"):
        shutil.rmtree(out / later)
    assert main(keys, "RESUME=auto") == 0
    for file in ("metrics.jsonl", "dynamics.jsonl"):
        rows = read_jsonl(out / file)
        assert without_clock(rows) == without_clock(read_jsonl(Path(f"{out}-whole") / file))
    assert {row["step"] for row in rows} == {2, 4, 6}
    assert {row["name"] for row in rows} >= {"lm.transformer.wte.weight"}


def test_a_run_by_the_learned_rule(settings, main):
    keys = settings | {"LR_RULE": "learned", "STEPS": 4, "SAVE_EVERY": 2}
    assert main(keys) == 0
    out = Path(settings["OUTPUT_DIR"])
    moved, rows = (read_jsonl(out / f"{name}.jsonl") for name in ("controller", "metrics"))
    assert {(row["rule"], row["signal"]) for row in moved} == {("learned", "kl")}
    assert [row["value"] for row in moved] == [row["update_kl"] for row in rows], "of that step"
