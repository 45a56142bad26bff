"""AdaptiveOptimizer around any optimizer, under whatever drives it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from adaptiverl import AdaptiveOptimizer, OnlineAdamW
from adaptiverl.optim.hyperparams import gradient_norm


def eight_bit(parameters) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit  # seconds to import

    return AdamW8bit(parameters, lr=0.01, min_8bit_size=1)


BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "AdamW 8-bit": eight_bit,
}
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}
RULES = {"lr_rule": "cyclical", "cycle_length": 4}  # × 1, .6, .2, .6, 1, …
CYCLE = [1, 0.6, 0.2, 0.6, 1, 0.6]
STEPS = 6


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=generator)
    return x, x.sum(-1, keepdim=True)


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def seen_rates(base: torch.optim.Optimizer) -> list[float]:
    """The rate that `base` steps with, each time it does."""
    rates: list[float] = []
    base.register_step_pre_hook(lambda opt, *_: rates.append(float(opt.param_groups[0]["lr"])))
    return rates


def plain(net, optimizer, scheduler) -> None:
    for step in range(STEPS):
        x, y = batch(step)
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(scheduler)


def scaled(net, optimizer, scheduler) -> None:
    """GradScaler, which divides gradients by the scale before the step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        x, y = batch(step)
        scaler.scale(nn.functional.mse_loss(net(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        advance(scheduler)


def accelerated(net, optimizer, scheduler) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(net, optimizer)
    for step in range(STEPS):
        x, y = batch(step)
        accelerator.backward(nn.functional.mse_loss(net(x), y))
        optimizer.step()
        optimizer.zero_grad()
        advance(scheduler)


def advance(scheduler) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def by_trainer(net, optimizer, scheduler) -> None:
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return STEPS * 16

        def __getitem__(self, i):
            x, y = batch(i // 16)
            return {"x": x[i % 16], "labels": y[i % 16]}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.net(x), labels)}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=16, max_steps=STEPS, report_to=[], use_cpu=True,
            save_strategy="no", max_grad_norm=0.0, disable_tqdm=True, logging_strategy="no",
            metric_for_best_model="loss",
            eval_strategy="steps" if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else
            "no", eval_steps=1,
        )  # fmt: skip
        InOrder(
            Net(),
            arguments,
            train_dataset=Rows(),
            eval_dataset=torch.utils.data.Subset(Rows(), range(16)),
            optimizers=(optimizer, scheduler),
        ).train()


LOOPS = {
    "plain": plain, "GradScaler": scaled, "accelerate": accelerated, "HF Trainer": by_trainer
}  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("base", BASES)
def test_it_composes_with_whoever_schedules_and_drives_it(base, scheduler, loop):
    """The rate of each step is the scheduled one times the rule's, and weights are those of `base`
    stepped at these rates."""
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    net = model()
    inner = BASES[base](net.parameters())
    optimizer = AdaptiveOptimizer(inner, **RULES)
    rates = seen_rates(inner)
    LOOPS[loop](net, optimizer, SCHEDULERS[scheduler](optimizer))

    reference = model()
    bare = BASES[base](reference.parameters())
    scheduled = seen_rates(bare)
    LOOPS[loop](reference, bare, SCHEDULERS[scheduler](bare))
    assert len(rates) == STEPS
    expected = [a * b for a, b in zip(scheduled, CYCLE, strict=True)]
    assert rates == pytest.approx(expected, rel=1e-5, abs=1e-9)

    alone = model()
    again = BASES[base](alone.parameters())
    for step, rate in enumerate(rates):
        x, y = batch(step)
        nn.functional.mse_loss(alone(x), y).backward()
        group = again.param_groups[0]
        group["lr"] = torch.tensor(rate) if isinstance(group["lr"], torch.Tensor) else rate
        again.step()
        again.zero_grad()
    for own, other in zip(weights(net), weights(alone), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_without_a_rule_it_is_its_base_bit_for_bit(base):
    nets = [model(), model()]
    bare = BASES[base](nets[0].parameters())
    wrapped = AdaptiveOptimizer(BASES[base](nets[1].parameters()))
    for step in range(100):
        x, y = batch(step)
        for net, optimizer in zip(nets, (bare, wrapped), strict=True):
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            if optimizer is wrapped:
                wrapped.step_loss(loss)
                wrapped.step_reward(-loss)
            optimizer.step()
            optimizer.zero_grad()
        assert all(map(torch.equal, weights(nets[0]), weights(nets[1])))


def test_an_overflow_under_gradscaler_makes_no_step_and_no_time():
    net = model()
    optimizer = AdaptiveOptimizer(BASES["AdamW fused"](net.parameters()), **RULES)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=1024.0), weights(net)
    (scaler.scale(net(batch(0)[0]).sum()) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, weights(net)))
    assert optimizer.controller.step == 0


@pytest.mark.parametrize("base", ["SGD", "AdamW", "AdamW tensor lr", "RMSprop"])
def test_saved_and_loaded_it_continues_bit_for_bit(base):
    rules = {
        "lr_rule": "trend+variance+patience+grad_norm", "reward_rule": "trend", "trend_window": 4,
        "var_window": 5, "patience": 3, "cooldown": 4,
    }  # fmt: skip
    rules |= {"momentum_rule": "relative"} if base == "SGD" else {}
    rules |= {"alpha_rule": "stable"} if base == "RMSprop" else {}

    def train(net, optimizer, steps):
        for step in steps:
            x, y = batch(step)
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            optimizer.step_loss(loss)
            optimizer.step_reward(-loss)
            optimizer.step()
            optimizer.zero_grad()

    net = model()
    optimizer = AdaptiveOptimizer(BASES[base](net.parameters()), **rules)
    train(net, optimizer, range(30))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, range(30, 60))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = model()
    other.load_state_dict(saved["net"])
    resumed = AdaptiveOptimizer(BASES[base](other.parameters()), **rules)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, range(30, 60))
    assert all(map(torch.equal, weights(net), weights(other)))
    assert resumed.controller.state_dict() == optimizer.controller.state_dict()
    assert resumed.lr == optimizer.lr != float(optimizer.param_groups[0]["lr"])


def test_a_group_is_added_to_the_base():
    net = model()
    first, *others = net.parameters()
    base = torch.optim.AdamW([first], lr=0.1)
    optimizer = AdaptiveOptimizer(base, reward_rule="trend")
    optimizer.add_param_group({"params": others, "lr": 0.01})
    assert optimizer.param_groups is base.param_groups
    assert [group["lr"] for group in base.param_groups] == [0.1, 0.01]
    before = weights(net)
    net(batch(0)[0]).sum().backward()
    optimizer.step()
    assert all((old != new).any() for old, new in zip(before, weights(net), strict=True))


def test_a_base_that_takes_no_group_says_so():
    net = model()
    optimizer = AdaptiveOptimizer(OnlineAdamW(net.parameters()), "trust_region")
    with pytest.raises(ValueError, match="needs all of its tensors at the beginning"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1
    net(batch(0)[0]).sum().backward()
    optimizer.step(measure_kl=lambda: 0.004)
    assert optimizer.info.kl == 0.004


def test_the_trust_region_refuses_a_step_that_needs_a_closure():
    base = torch.optim.LBFGS(model().parameters())
    with pytest.raises(ValueError, match="cannot search the step of LBFGS: it takes a closure"):
        AdaptiveOptimizer(base, "trust_region")


@pytest.mark.parametrize("rule", ["learned", "grad_norm"])
def test_other_rules_make_a_step_that_needs_a_closure(rule):
    net = model()
    optimizer = AdaptiveOptimizer(torch.optim.LBFGS(net.parameters(), lr=0.1), rule)
    x, y = batch(0)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        return loss

    given = {"measure_kl": lambda: 0.004} if rule == "learned" else {}
    losses = [optimizer.step(closure, **given).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2] and optimizer.controller.step == 3


def test_a_state_of_other_groups_is_refused():
    one = AdaptiveOptimizer(BASES["SGD"](model().parameters()), **RULES)
    state = copy.deepcopy(one.controller.state_dict())
    one.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="of 1 parameter groups, the optimizer has 2"):
        one.controller.load_state_dict(state)


def test_it_shows_what_it_moves():
    net = model()
    optimizer = AdaptiveOptimizer(
        torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01), wd_rule="trend",
        lr_rule="trend", trend_window=2, wd_down=0.5, up_factor=2, memory=1e9,
    )  # fmt: skip
    optimizer.step_loss(2.0)
    optimizer.step_loss(torch.tensor(1.0))
    assert optimizer.lr == pytest.approx(2e-3)
    assert optimizer.wd == pytest.approx(0.005)
    assert optimizer.betas == (0.9, 0.999)
    assert optimizer.momentum is None
    assert optimizer.param_groups[0]["lr"] == 1e-3, "whoever schedules it finds it as it was"


def test_the_gradients_norm_is_its_own_to_see():
    p = nn.Parameter(torch.zeros(4))
    optimizer = AdaptiveOptimizer(torch.optim.SGD([p], lr=1.0), lr_rule="grad_norm")
    for size in (1.0, 1.0, 4.0):
        p.grad = torch.full((4,), size / 2)  # of norm `size`
        optimizer.step()
    seen = optimizer.controller.seen["grad_norm"]
    assert optimizer.lr == pytest.approx(seen["mean_abs"] / 4.0, rel=0.3) and optimizer.lr < 0.5


def test_the_norm_of_sparse_gradients_is_that_of_dense_ones():
    """A row that came twice counts once, with the sum of its gradients."""
    norms = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = nn.Embedding(6, 3, sparse=sparse)
        net(torch.tensor([1, 2, 2])).square().sum().backward()
        norms.append(gradient_norm(net.parameters()))
        AdaptiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "grad_norm").step()
    assert norms[0] == pytest.approx(norms[1])


def test_the_learned_rule_without_a_kl_warns_once(caplog):
    informed, blind = (
        AdaptiveOptimizer(torch.optim.SGD(model().parameters(), lr=0.1), lr_rule="learned")
        for _ in range(2)
    )
    informed.measure_kl = lambda: 0.001
    for optimizer in (informed, blind):
        for _ in range(25):
            optimizer.step_loss(1.0)
            optimizer.step()
        assert len(caplog.records) == (optimizer is blind)
    assert informed.lr != 0.1 == blind.lr
    assert [r.getMessage()[:18] for r in caplog.records] == ["no KL was measured"]


def test_the_trust_region_without_a_kl_says_what_to_give():
    optimizer = AdaptiveOptimizer(BASES["SGD"](model().parameters()), lr_rule="trust_region")
    with pytest.raises(ValueError, match=r"give step\(measure_kl=f\), or set optimizer.measure_kl"):
        optimizer.step()


def test_only_what_the_optimizer_has_is_touched():
    optimizer = AdaptiveOptimizer(
        torch.optim.Adagrad(model().parameters(), lr=0.1),
        momentum_rule="inverse", betas_rule=("relative", "variance"), alpha_rule="stable",
        wd_rule="trend",
    )  # fmt: skip
    before = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    for loss in (3.0, 2.0, 1.0):
        optimizer.step_loss(loss)
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == before


def shared_rate() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Three groups, two of which have one tensor as their learning rate."""
    weights = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    rate = torch.tensor(0.1)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(weights, (rate, rate, 0.2), strict=True)]
    return weights, torch.optim.SGD(groups)


def test_a_rate_that_groups_share_is_scaled_once_and_restored():
    weights, base = shared_rate()
    optimizer = AdaptiveOptimizer(base, **RULES)
    for factor in CYCLE:
        before = [p.detach().clone() for p in weights]
        for p in weights:
            p.grad = torch.ones(3)
        optimizer.step()
        for p, old, rate in zip(weights, before, (0.1, 0.1, 0.2), strict=True):
            torch.testing.assert_close(p.detach(), old - factor * rate)
        assert [float(g["lr"]) for g in base.param_groups] == pytest.approx([0.1, 0.1, 0.2])


@pytest.mark.parametrize("cls", ["SGD", "RMSprop"])
def test_momentum_that_a_schedule_cycles_stays_the_schedules(cls):
    """The trend of rewards also moves momentum: where it moved nothing, it writes nothing."""
    moments: list[list[float]] = []
    for wrapped in (False, True):
        net = model()
        optimizer = getattr(torch.optim, cls)(net.parameters(), lr=0.1, momentum=0.9)
        if wrapped:
            optimizer = AdaptiveOptimizer(optimizer, reward_rule="trend")
        schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        moments.append([])
        for step in range(10):
            net(batch(step)[0]).sum().backward()
            if wrapped:
                optimizer.step_reward(0.5)
            optimizer.step()
            moments[-1].append(optimizer.param_groups[0]["momentum"])
            if step < 9:
                schedule.step()
    assert moments[0] == moments[1]
    assert len(set(moments[0])) > 5


def test_a_rule_and_a_schedule_of_the_same_momentum_are_told_of(caplog):
    base = torch.optim.SGD(model().parameters(), lr=0.1, momentum=0.9)
    optimizer = AdaptiveOptimizer(base, momentum_rule="relative", trend_window=2, memory=1e9)
    group = optimizer.param_groups[0]
    for loss in (2.0, 1.0):
        optimizer.step_loss(loss)
    assert group["momentum"] == pytest.approx(0.91)
    group["momentum"] = 0.8  # a schedule
    for loss in (0.5, 0.2):
        optimizer.step_loss(loss)
    assert group["momentum"] == pytest.approx(0.82), "the rule goes on from there"
    assert caplog.text.count("something else sets the momentum too") == 1


@pytest.mark.parametrize("kind", ["SGD8bit", "RMSprop8bit"])
def test_what_bitsandbytes_keeps_in_betas_is_found_there(kind):
    """Its SGD keeps (momentum, dampening) there, its RMSprop (alpha, momentum)."""
    import bitsandbytes

    more = {"momentum": 0.9} if kind == "SGD8bit" else {"alpha": 0.9}
    base = getattr(bitsandbytes.optim, kind)(model().parameters(), lr=0.1, **more)
    optimizer = AdaptiveOptimizer(
        base, momentum_rule="inverse", alpha_rule="stable", betas_rule=("relative", "variance"),
        loss_beta=0.0, var_window=2,
    )  # fmt: skip
    assert optimizer.betas is None, "these are no betas"
    for loss in (0.0, 2.0, 6.0):
        optimizer.step_loss(loss)
    moved = 1 - 1 / 7 if kind == "SGD8bit" else 1 - 0.1 / 4
    assert base.param_groups[0]["betas"] == pytest.approx((moved, 0.0))
    assert optimizer.momentum == (pytest.approx(moved) if kind == "SGD8bit" else None)


def test_signals_go_to_the_object_that_is_held_when_accelerate_has_wrapped_it():
    from accelerate import Accelerator

    net = model()
    held = AdaptiveOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1), lr_rule="loss_decay", loss_k=1.0, loss_beta=0.0,
        memory=float("inf"), max_drift=100.0,
    )  # fmt: skip
    rates = seen_rates(held.base)
    net, prepared = Accelerator(cpu=True).prepare(net, held)
    assert prepared.optimizer is held
    for loss in (1.0, 3.0):
        net(batch(0)[0]).sum().backward()
        held.step_loss(loss)
        prepared.step()
    assert rates == pytest.approx([0.05, 0.0125])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("base", ["SGD", "AdamW tensor lr", "AdamW foreach"])
def test_a_copy_goes_on_as_the_original_does(base, copied):
    """With its model, as torch's optimizers are copied."""

    def train(net, optimizer, steps):
        for step in steps:
            x, y = batch(step)
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            optimizer.step_loss(loss)
            optimizer.step()
            optimizer.zero_grad()

    net = model()
    optimizer = AdaptiveOptimizer(
        BASES[base](net.parameters()), lr_rule="trend+learned", trend_window=3
    )
    train(net, optimizer, range(10))
    other, twin = copied((net, optimizer))
    assert twin.param_groups is twin.base.param_groups and twin.base is twin.controller.optimizer
    assert twin.base is not optimizer.base
    train(net, optimizer, range(10, 20))
    assert not all(map(torch.equal, weights(net), weights(other)))
    train(other, twin, range(10, 20))
    assert all(map(torch.equal, weights(net), weights(other)))
    assert twin.lr == optimizer.lr != float(twin.param_groups[0]["lr"])


@pytest.mark.parametrize("value", ["x", [1], torch.ones(2)], ids=str)
@pytest.mark.parametrize("name", ["loss", "reward", "grad_norm"])
def test_a_signal_that_is_no_number_is_named(name, value):
    optimizer = AdaptiveOptimizer(torch.optim.SGD(model().parameters(), lr=0.1), "trend")
    with pytest.raises(TypeError, match=rf"^{name} is .*; it must be one number$"):
        optimizer.observe(**{name: value})


def test_what_is_no_optimizer_and_what_is_no_state():
    with pytest.raises(TypeError, match=r"^base is a generator; it must be an optimizer, such as"):
        AdaptiveOptimizer(model().parameters(), "trend")
    optimizer = AdaptiveOptimizer(torch.optim.SGD(model().parameters(), lr=0.1), "trend")
    with pytest.raises(ValueError, match="no state of an optimizer: it has no param_groups"):
        optimizer.load_state_dict({})


def test_a_state_that_does_not_fit_is_refused():
    optimizer = AdaptiveOptimizer(BASES["SGD"](model().parameters()), lr_rule="learned")
    state = optimizer.state_dict()
    state["learned"]["hidden"] = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"hidden is \[1, 3\] there and \[1, 16\] here"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="no state of a controller: it has no base"):
        optimizer.controller.load_state_dict({"step": 1})


def test_the_documents_usage(capsys):
    """As it is written there, imports aside."""
    from torch.optim import AdamW

    net = model()
    dataloader = [batch(k) for k in range(200)]
    criterion = nn.MSELoss()

    entries: list[dict] = []
    base_opt = AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    opt = AdaptiveOptimizer(
        base_opt,
        lr_rule="trend+variance",
        betas_rule=("relative", "variance"),
        wd_rule="trend",
        reward_rule="trend",
        cycle_length=500,
        cycle_mult=2,
        record=entries.append,
    )
    losses = []
    for step, (x, y) in enumerate(dataloader, 1):
        loss = criterion(net(x), y)
        loss.backward()
        opt.step_loss(loss)
        reward = 1.0 / (1.0 + loss.item())
        opt.step_reward(reward)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"[{step}] Loss={loss.item():.4f} | LR={opt.lr:.6e} | WD={opt.wd:.5f}")
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert 1e-3 / 9 < opt.lr < 9e-3, "two rules of at most a factor of 3"
    assert entries and opt.wd != 0.01, "the rules were at work"
    assert len(capsys.readouterr().out.splitlines()) == 2


# The trust region in other people's loops

WORDS, CONTEXT = 12, 3


class TinyLM(nn.Module):
    """A causal language model: an embedding of the last words, one hidden layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.hidden, self.head = nn.Linear(CONTEXT * 16, 32), nn.Linear(32, WORDS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T, WORDS] log-probabilities of each next word; `ids` [B, T]."""
        padded = nn.functional.pad(ids, (CONTEXT - 1, 0)).unfold(1, CONTEXT, 1)  # [B, T, CONTEXT]
        return self.head(torch.tanh(self.hidden(self.embed(padded).flatten(2)))).log_softmax(-1)


def reinforce(lr: float, rule, make=torch.optim.AdamW, steps: int = 60):
    """A plain loop of REINFORCE: the mean reward of the last batches, and the last entropy."""
    torch.manual_seed(0)
    policy = TinyLM()
    optimizer = AdaptiveOptimizer(make(policy.parameters(), lr=lr), lr_rule=rule, steps=steps)
    generator, rewards = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        ids = torch.zeros(32, 1, dtype=torch.long)
        with torch.no_grad():
            for _ in range(8):
                probabilities = policy(ids)[:, -1].exp()
                word = torch.multinomial(probabilities, 1, generator=generator)
                ids = torch.cat([ids, word], 1)
            before = policy(ids[:, :-1])
        reward = ((ids[:, 1:] - ids[:, :-1]) % WORDS < 6).float() @ torch.ones(8) / 8
        reward -= (ids[:, 1:] == ids[:, :-1]).float().mean(1)  # a small step up, and never none
        advantage = reward - reward.mean()
        chosen = policy(ids[:, :-1]).gather(-1, ids[:, 1:, None])[..., 0]
        (-(advantage[:, None] * chosen).mean()).backward()

        @torch.no_grad()
        def measure_kl(before=before, ids=ids) -> float:
            now = policy(ids[:, :-1])
            return (before.exp() * (before - now)).sum(-1).mean().item()

        optimizer.step(measure_kl=measure_kl)
        optimizer.zero_grad()
        rewards.append(reward.mean().item())
    entropy = -(before.exp() * before).sum(-1).mean().item()
    return sum(rewards[-10:]) / 10, entropy, optimizer


@pytest.mark.parametrize("base", ["AdamW", "OnlineAdamW"])
@pytest.mark.parametrize("lr", [1e-6, 1.0])
def test_in_a_foreign_loop_the_trust_region_learns_from_any_rate(lr, base):
    make = OnlineAdamW if base == "OnlineAdamW" else torch.optim.AdamW
    reward, _, optimizer = reinforce(lr, {"name": "trust_region", "trust_region_kl": 0.02}, make)
    assert reward > 0.95, "from 0.42"
    assert optimizer.info.kl <= 2 * optimizer.info.target
    assert optimizer.param_groups[0]["lr"] == lr


def test_in_a_foreign_loop_a_rate_of_1_collapses_without_it():
    reward, entropy, optimizer = reinforce(1.0, "none")
    assert entropy < 0.1 and reward < 0.42 and optimizer.info is None


def test_it_composes_with_other_rules_and_records_follow_each_other():
    entries: list[dict] = []
    net, rates = model(), []
    optimizer = AdaptiveOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), cycle_length=4,
        lr_rule="trust_region+cyclical", reward_rule="scaling", record=entries.append,
    )  # fmt: skip
    for step in range(6):
        x, y = batch(step)
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step_reward(0.1 * step)
        before = net(x).detach()
        optimizer.step(measure_kl=lambda x=x, old=before: (net(x) - old).square().mean().item())
        optimizer.zero_grad()
        rates.append(optimizer.info.lr)
    rate = 0.01
    for entry in entries:
        assert entry["old"] == pytest.approx(rate, rel=1e-6), "no change without a record"
        rate = entry["new"]
        if entry["rule"] == "line_search":
            assert rate == pytest.approx(rates[entry["step"]])
    assert optimizer.lr == pytest.approx(rate)
    assert {entry["rule"] for entry in entries} >= {"trust_region", "cyclical"}
    optimizer.tick()
    assert optimizer.trust_region.time == optimizer.controller.step == 7


@pytest.mark.parametrize("rule", ["trust_region", "trust_region+learned+trend"])
def test_its_trust_region_is_saved_with_it(rule):
    def train(net, optimizer, steps):
        for step in steps:
            x, y = batch(step)
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            old = net(x).detach()
            optimizer.observe(loss=loss)
            optimizer.step(measure_kl=lambda x=x, old=old: (net(x) - old).square().mean().item())
            optimizer.zero_grad()

    nets = [model() for _ in range(2)]
    one, other = (AdaptiveOptimizer(BASES["AdamW"](net.parameters()), rule) for net in nets)
    train(nets[0], one, range(5))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    nets[1].load_state_dict(nets[0].state_dict())
    for net, optimizer in zip(nets, (one, other), strict=True):
        train(net, optimizer, range(5, 10))
    assert all(map(torch.equal, weights(nets[0]), weights(nets[1])))
    assert one.lr == other.lr and one.trust_region.ratio == other.trust_region.ratio != 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_rule": "trust_region", "trust_region_kl": -1}, "trust_region_kl is -1; it must be"),
        (
            {"trust_region_kl": 0.1},
            "no chosen rule reads trust_region_kl; these do: lr_rule trust_region, ",
        ),
        ({"lr_rule": "trust_region", "max_lr": 1e-3}, "the rate 0.1 is outside its bounds"),
        ({"lr_rule": "trust_region", "trust_region_schedule": "cosine"}, "trust_region_schedule"),
        ({"trust_region_schedule": "constant"}, "trust_region_schedule is given, and nothing uses"),
        (
            {"lr_rule": "trend", "min_kl": 0.1},
            "min_kl is given, and nothing uses a KL",
        ),
        ({"lr_rule": "trust_region", "min_kl": -0.1}, r"min_kl is -0.1; it must be in \[0, inf\)"),
        ({"lr_rule": "learned", "min_kl": float("nan")}, "min_kl is nan"),
        ({"wd_rule": "trend", "min_lr": 2.0}, "min_lr bounds the rate, and no rule"),
    ],
)
def test_arguments_of_the_trust_region_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveOptimizer(BASES["SGD"](model().parameters()), **arguments)


@pytest.mark.parametrize(
    "given", [{"measure_kl": lambda: 0.0}, {"min_kl": 0.1}], ids=["measure_kl", "min_kl"]
)
def test_a_step_with_a_kl_that_nothing_uses_is_refused(given):
    net = model()
    optimizer = AdaptiveOptimizer(BASES["SGD"](net.parameters()), wd_rule="trend")
    optimizer.measure_kl = lambda: 0.0  # a callback may set it, whatever the rule
    before = weights(net)
    net(batch(0)[0]).sum().backward()
    with pytest.raises(ValueError, match=f"{next(iter(given))} is given, and nothing uses a KL"):
        optimizer.step(**given)
    assert all(map(torch.equal, before, weights(net)))
    optimizer.step()
    with pytest.raises(ValueError, match="min_kl is -1"):
        AdaptiveOptimizer(BASES["SGD"](net.parameters()), "learned").step(min_kl=-1)


@pytest.mark.parametrize("base", ["SGD", "OnlineAdamW"])
def test_what_uses_a_kl_takes_it(base):
    net = model()
    made = OnlineAdamW(net.parameters()) if base == "OnlineAdamW" else BASES[base](net.parameters())
    rule = "none" if base == "OnlineAdamW" else "learned"
    optimizer = AdaptiveOptimizer(made, rule, min_kl=0.5, trust_region_schedule="constant")
    loss = net(batch(0)[0]).sum()
    loss.backward()
    optimizer.step(measure_kl=lambda: loss * 0 + 0.25)
    assert optimizer.info.kl == 0.25 and type(optimizer.info.kl) is float
    assert optimizer.info.target == 0.5


def test_hooks_of_its_state_run_once():
    net, seen = model(), []
    base = BASES["AdamW"](net.parameters())
    optimizer = AdaptiveOptimizer(base, "trend")
    for name, one in (("wrapper", optimizer), ("base", base)):
        one.register_state_dict_pre_hook(lambda o, name=name: seen.append((name, "before", o)))
        one.register_load_state_dict_post_hook(lambda o, name=name: seen.append((name, "end", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: state | {"note": 1})
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append(sorted(state)))
    optimizer.register_load_state_dict_pre_hook(
        lambda o, state: {k: v for k, v in state.items() if k != "note"}
    )
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(sorted(state)))
    state = optimizer.state_dict()
    names = ["controller", "note", "param_groups", "state"]
    assert seen == [("wrapper", "before", optimizer), ("base", "before", base), names]
    seen.clear()
    optimizer.load_state_dict(state)
    names.remove("note")
    assert seen == [names, ("base", "end", base), ("wrapper", "end", optimizer)]
    assert "note" in state, "the callers state is left alone"


@pytest.mark.parametrize("base", ["AdamW", "AdamW tensor lr"])
def test_reading_its_state_for_a_distributed_checkpoint_is_no_step(base):
    """torch makes a step of rate 0 and gradients of 0, and gets the state of the base alone."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net = model()
    optimizer = AdaptiveOptimizer(BASES[base](net.parameters()), "trust_region+cosine")
    own, rate = optimizer.state_dict(), float(optimizer.param_groups[0]["lr"])
    state = get_optimizer_state_dict(net, optimizer)
    assert set(state) == {"state", "param_groups"}
    assert {k: v for k, v in optimizer.state_dict().items() if k in optimizer.parts} == {
        k: own[k] for k in optimizer.parts
    }
    assert float(optimizer.param_groups[0]["lr"]) == rate
    assert optimizer.controller.step == optimizer.trust_region.time == 0


def test_a_step_of_rate_0_with_a_gradient_is_one():
    net = model()
    optimizer = AdaptiveOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), "cosine")
    net(batch(0)[0]).sum().backward()
    optimizer.step()
    assert optimizer.controller.step == 1


def test_the_target_of_a_rule_with_constants():
    rule = {"name": "trust_region", "trust_region_kl": 0.5}

    def make(**more) -> AdaptiveOptimizer:
        return AdaptiveOptimizer(BASES["Adagrad"](model().parameters()), rule, **more)

    assert make().trust_region.target == make(steps=4).trust_region.target == 0.5
    falling, constant = make(steps=4), make(steps=4, trust_region_schedule="constant")
    for optimizer in (falling, constant):
        optimizer.tick()
    assert (falling.trust_region.target, constant.trust_region.target) == (0.375, 0.5)


@pytest.mark.parametrize("name", ["measure_kl", "record"])
def test_what_is_no_function_is_refused_where_it_is_given(name):
    with pytest.raises(TypeError, match=f"{name} is 3; it must be a function, or None"):
        AdaptiveOptimizer(BASES["SGD"](model().parameters()), "trust_region", **{name: 3})


def test_an_adaptive_optimizer_in_another_is_refused():
    with pytest.raises(TypeError, match="base is an AdaptiveOptimizer already"):
        AdaptiveOptimizer(AdaptiveOptimizer(BASES["SGD"](model().parameters()), "trend"), "trend")


def test_a_text_is_no_number():
    optimizer = AdaptiveOptimizer(BASES["SGD"](model().parameters()), reward_rule="trend")
    with pytest.raises(TypeError, match="reward is '1'; it must be one number"):
        optimizer.step_reward("1")


@pytest.mark.parametrize(
    ("rules", "warned"),
    [
        ({"lr_rule": "trend"}, 1),
        ({"lr_rule": "none"}, 0),
        ({"lr_rule": "learned"}, 0),
        ({"reward_rule": "trend"}, 0),
    ],
)
def test_a_reward_that_nothing_reads_is_warned_of_once(rules, warned, caplog):
    optimizer = AdaptiveOptimizer(BASES["SGD"](model().parameters()), **rules)
    for _ in range(3):
        optimizer.step_reward(1.0)
    told = "step_reward: no rule reads rewards, so this one moves nothing. Choose a reward_rule, "
    assert [record.getMessage().startswith(told) for record in caplog.records] == [True] * warned


@pytest.mark.parametrize(
    ("rules", "others", "message"),
    [
        ("trust_region", "trend", "the state is of lr_rule trust_region, which is not chosen here"),
        (
            "cosine",
            "trust_region",
            "the state is also of the rule cosine, which is not chosen here",
        ),
        ("cosine", "none", "the state is also of the rule cosine, which is not chosen here"),
    ],
)
def test_what_a_state_loses_in_other_rules_is_said(rules, others, message, caplog):
    one, other = (
        AdaptiveOptimizer(BASES["SGD"](model().parameters()), rule) for rule in (rules, others)
    )
    one.tick()
    state = one.state_dict()
    one.load_state_dict(state)
    assert not caplog.records, "its own"
    other.load_state_dict(state)
    assert [record.getMessage()[: len(message)] for record in caplog.records] == [message]


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("foo", "lr_rule: there is no rule 'foo'; all are trust_region, "),
        ("tend", "lr_rule: there is no rule 'tend'; the nearest is 'trend', and all are "),
        ("scaling", "cosine_restart. 'scaling' is a rule of reward_rule"),
    ],
)
def test_an_unknown_rule_is_told_what_there_is(rule, told):
    with pytest.raises(ValueError, match="there is no rule") as error:
        AdaptiveOptimizer(BASES["SGD"](model().parameters()), rule)
    assert told in str(error.value)
