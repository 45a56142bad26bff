"""AdaptiveScheduler and RewardAdaptiveScheduler: the seeds' examples, run as they were written."""

import io
import math
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from adaptiverl import AdaptiveOptimizer, AdaptiveScheduler, OnlineAdamW, RewardAdaptiveScheduler
from adaptiverl.integrations.hf import RewardObserveCallback
from adaptiverl.integrations.trl import RewardTap


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(10, 1)


def make_toy_dataset(n=512):
    torch.manual_seed(0)
    x = torch.randn(n, 10)
    true_w = torch.randn(10, 1)
    y = x @ true_w + 0.1 * torch.randn(n, 1)
    return TensorDataset(x, y)


def demo(seed: int, adaptive: bool) -> float:
    """Seed 5's demo; its last epoch's mean loss."""
    loader = DataLoader(make_toy_dataset(), batch_size=64, shuffle=True)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if adaptive:
        scheduler = AdaptiveScheduler(
            optimizer,
            up_factor=1.03, down_factor=0.8,
            patience=20, cooldown=40,
            use_cosine=True, T0=100, T_mult=2,
            lr_min=1e-5, lr_max=1.0,
        )  # fmt: skip
    last = []
    for epoch in range(5):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            if adaptive:
                scheduler.step_loss(loss)
            if epoch == 4:
                last.append(loss.item())
    return sum(last) / len(last)


def test_seed_5s_demo_learns_as_plain_sgd_does():
    """Run as written in the seed it ends 21 times higher: 2.8 against 0.13."""
    adaptive = [demo(seed, True) for seed in range(5)]
    plain = [demo(seed, False) for seed in range(5)]
    assert sum(adaptive) <= sum(plain)


def test_seed_3s_quickstart():
    optimizer = AdamW(linear().parameters(), lr=5e-5, weight_decay=0.01)
    sched = AdaptiveScheduler(
        optimizer,
        lr_rule="trend",
        momentum_rule="none",
        reward_rule="trend",
        ema_reward_beta=0.9,
        min_lr=1e-6, max_lr=5e-4,
    )  # fmt: skip
    rates = []
    for step in range(60):
        sched.observe(loss=None, R=step / 60, model=None)
        rates += sched.get_lr()
    assert rates[18] == 5e-5, "the trend is tested on twenty rewards"
    assert rates[-1] > 5e-5, "and found"
    assert rates[-1] <= 5e-4


def test_seed_4s_quick_usage():
    optimizer = AdamW(linear().parameters(), lr=5e-5)
    scheduler = RewardAdaptiveScheduler(
        optimizer,
        rule="kelly",
        ema_reward_beta=0.9,
        min_lr=1e-6,
        max_lr=1e-3,
        kelly_gain=0.2,
        kelly_temp=1.0,
    )
    for _ in range(1000):
        scheduler.observe(R=1.0)
    assert scheduler.get_lr()[0] == 1e-3, "it drifts to its bound by design, and stays there"


@pytest.mark.parametrize(
    "arguments",
    [
        {"up_factor": 1.02, "down_factor": 0.9, "patience": 40},
        {"use_cosine": True, "T0": 100, "T_mult": 2},
        {"use_reward": True, "reward_up": 1.05, "reward_down": 0.8},
    ],
)
def test_seed_5s_example_configurations(arguments):
    optimizer = SGD(linear().parameters(), lr=0.05, momentum=0.9)
    scheduler = AdaptiveScheduler(optimizer, **arguments)
    for step in range(300):
        scheduler.step_loss(torch.tensor(1 / (step + 1)), reward=step / 300)
    assert 0.005 < optimizer.param_groups[0]["lr"] < 0.5
    moved = {entry["rule"] for entry in scheduler.controller.audit}
    assert ("cosine_restart" in moved) == ("use_cosine" in arguments)
    assert ("reward trend" in moved) == ("use_reward" in arguments)


def test_every_argument_of_the_seeds_is_accepted():
    for names in (
        "loss_beta reward_beta var_window up_factor down_factor min_rel_improve var_damp_base "
        "var_damp_scale reward_up reward_down momentum_up momentum_down big_drop eta_min_scale "
        "lr_min lr_max momentum_min momentum_max T_mult",
        "min_lr max_lr min_momentum max_momentum ema_reward_beta",
    ):
        optimizer = SGD(linear().parameters(), lr=0.5, momentum=0.5)
        low = ("lr_min", "min_lr", "momentum_min", "min_momentum")
        AdaptiveScheduler(optimizer, **{name: 0 if name in low else 1 for name in names.split()})
    with pytest.raises(TypeError, match="upfactor"):
        AdaptiveScheduler(optimizer, upfactor=1.1)
    with pytest.raises(ValueError, match="load_state_dict"):
        AdaptiveScheduler(optimizer, last_epoch=3)


def test_none_everywhere_is_inert():
    optimizer = SGD(linear().parameters(), lr=0.5, momentum=0.5)
    scheduler = AdaptiveScheduler(optimizer, lr_rule="none")
    for loss in (1.0, 2.0, 3.0, math.nan):
        assert scheduler.step_loss(loss) == [0.5]
    assert scheduler.last_epoch == 4


def test_set_metrics_and_step_are_step_loss_in_two_calls():
    rates = []
    for two_calls in (True, False):
        optimizer = SGD(linear().parameters(), lr=0.5, momentum=0.5)
        scheduler = AdaptiveScheduler(
            optimizer,
            lr_rule="loss_decay",
            loss_k=1.0,
            loss_beta=0.0,
            max_drift=100.0,
            memory=math.inf,
        )
        for loss in (1.0, 3.0):
            if two_calls:
                scheduler.set_metrics(loss)
                scheduler.step()
            else:
                scheduler.step_loss(loss)
        scheduler.step()  # without news
        rates.append(scheduler.get_last_lr())
    assert rates[0] == rates[1] == [pytest.approx(1 / 16)]


def test_the_model_gives_the_gradient_norm():
    model = linear()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = AdaptiveScheduler(optimizer, lr_rule="grad_norm")
    rates = []
    for size in (1.0, 1.0, 4.0):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        model.bias.grad.fill_(size)
        rates += scheduler.observe(model=model)
    assert rates == pytest.approx([1, 1, 1 / 4])


def test_saved_and_loaded_it_continues_bit_for_bit():
    arguments = {"use_reward": True, "use_cosine": True, "T0": 7, "trend_window": 3, "patience": 2}
    losses = [math.sin(k * k) + 2 for k in range(80)]

    def walk(scheduler, steps) -> list[float]:
        return [scheduler.step_loss(losses[k], reward=-losses[k])[0] for k in steps]

    optimizer = SGD(linear().parameters(), lr=0.05, momentum=0.9)
    scheduler = AdaptiveScheduler(optimizer, **arguments)
    walk(scheduler, range(40))
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
    expected = walk(scheduler, range(40, 80))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = SGD(linear().parameters(), lr=0.05, momentum=0.9)
    resumed = AdaptiveScheduler(other, **arguments)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert walk(resumed, range(40, 80)) == expected
    assert other.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"]


def test_a_second_scheduler_on_the_same_optimizer_is_refused():
    optimizer = SGD(linear().parameters(), lr=0.5)
    scheduler = AdaptiveScheduler(optimizer, lr_rule="loss_decay")
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    optimizer.step()
    scheduler.step_loss(1.0)
    cosine.step()
    with pytest.raises(RuntimeError, match="AdaptiveOptimizer works beside other schedulers"):
        scheduler.step_loss(1.0)


def texts(tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained("adaptiverl/assets/policy", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), tokenizer, Dataset.from_dict({"prompt": ["This film"] * 16})


@pytest.mark.parametrize("kind", ["RLOO", "GRPO"])
@pytest.mark.parametrize("face", ["optimizer", "scheduler", "online"])
@pytest.mark.filterwarnings("ignore")
def test_inside_trls_trainers(kind, face, tmp_path):
    """The reward that TRL computed is what the rule sees, and the rate of each step follows."""
    import trl

    model, tokenizer, dataset = texts(tmp_path)
    batches = []

    def reward(completions, **_):
        batches.append(len(batches))
        return [float(batches[-1])] * len(completions)  # 0, 1, 2, …: a rising reward

    tap = RewardTap(reward)
    base = AdamW(model.parameters(), lr=1e-3)
    rates: list[float] = []
    base.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    rule = {"trend_window": 2, "reward_up": 2.0, "memory": math.inf, "max_drift": 100.0}
    if face == "optimizer":
        optimizer = watched = AdaptiveOptimizer(base, reward_rule="trend", **rule)
    elif face == "scheduler":
        optimizer, watched = base, RewardAdaptiveScheduler(base, rule="trend", **rule)
    else:  # its head is zero: each tensor at the rate of all
        optimizer = watched = OnlineAdamW(
            model.parameters(), lr=1e-3, weights=None, learn=False, reward_rule="trend", **rule
        )
        optimizer.register_step_post_hook(
            lambda opt, *_: rates.append(next(iter(opt.rates.values())).item())
        )
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=4,
        max_completion_length=4, report_to=[], use_cpu=True, save_strategy="no", bf16=False,
        lr_scheduler_type="linear", learning_rate=1e-3, disable_tqdm=True,
        gradient_checkpointing=False, beta=0.0,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=tap,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[RewardObserveCallback(watched, tap.last)],
    )
    trainer.train()
    # linear 1, 3/4, 1/2, 1/4; the reward has risen before the third step and again
    assert rates == pytest.approx([1e-3, 0.75e-3, 2 * 0.5e-3, 4 * 0.25e-3])


@pytest.mark.filterwarnings("ignore")
def test_seed_3s_integration_with_trl(tmp_path):
    """As it is written there, with RLOOTrainer for the ReinforceTrainer that TRL does not have."""
    from trl import RLOOConfig, RLOOTrainer

    model, tokenizer, dataset = texts(tmp_path)
    rewards = [0.0]

    def my_reward_fn(completions, **_):
        rewards.append(rewards[-1] + 1.0)
        return [rewards[-1]] * len(completions)

    def last_reward():
        return rewards[-1]

    optimizer = AdamW(model.parameters(), lr=5e-5)
    sched = AdaptiveScheduler(
        optimizer, lr_rule="none", reward_rule="trend", trend_window=2, reward_up=2.0
    )

    _orig_step = optimizer.step

    def _wrapped_step(self, *a, **kw):
        out = _orig_step(*a, **kw)
        sched.observe(loss=None, R=last_reward(), model=None)
        return out

    optimizer.step = types.MethodType(_wrapped_step, optimizer)

    trainer = RLOOTrainer(
        model=model,
        args=RLOOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4,
            max_steps=3, max_completion_length=4, report_to=[], use_cpu=True, bf16=False,
            save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, beta=0.0,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        reward_funcs=my_reward_fn,
    )  # fmt: skip
    trainer.optimizer = optimizer
    trainer.lr_scheduler = sched
    trainer.train()
    assert rewards == [0.0, 1.0, 2.0, 3.0]
    lean = 1 - 1 / 100
    twice = (2.0**lean * 2.0) ** lean
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-5 * min(twice, 3.0))
