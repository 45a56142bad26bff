"""AdaptiveScheduler and RewardAdaptiveScheduler: the documents' examples, as they are written."""

import asyncio
import copy
import inspect
import io
import math
import pickle
import types
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from adaptiverl import (
    AdamMini,
    AdaptiveOptimizer,
    AdaptiveScheduler,
    OnlineAdamW,
    RewardAdaptiveScheduler,
)
from adaptiverl.integrations.hf import RewardObserveCallback
from adaptiverl.integrations.trl import RewardTap, TrustRegionCallback
from adaptiverl.optim.rules import RULES
from adaptiverl.optim.schedulers import ALIASES


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
    """The demo of the scheduler's document; its last epoch's mean loss."""
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


def test_the_documents_demo_learns_as_plain_sgd_does():
    """Run as written there it ends 21 times higher: 2.8 against 0.13."""
    adaptive = [demo(seed, True) for seed in range(5)]
    plain = [demo(seed, False) for seed in range(5)]
    assert sum(adaptive) <= sum(plain)


def test_the_quickstart():
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


def test_the_quick_usage():
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
def test_example_configurations(arguments):
    optimizer = SGD(linear().parameters(), lr=0.05, momentum=0.9)
    entries: list[dict] = []
    scheduler = AdaptiveScheduler(optimizer, record=entries.append, **arguments)
    for step in range(300):
        scheduler.step_loss(torch.tensor(1 / (step + 1)), reward=step / 300)
    assert 0.005 < optimizer.param_groups[0]["lr"] < 0.5
    moved = {entry["rule"] for entry in entries}
    assert ("cosine_restart" in moved) == ("use_cosine" in arguments)
    assert ("reward trend" in moved) == ("use_reward" in arguments)


def test_every_argument_of_the_documents_is_accepted():
    """The signature of one document with its own values; then those of two others."""
    optimizer = SGD(linear().parameters(), lr=0.5, momentum=0.5)
    AdaptiveScheduler(
        optimizer, loss_beta=0.9, reward_beta=0.9, var_window=20, up_factor=1.05, down_factor=0.7,
        min_rel_improve=1e-4, var_damp_base=1.0, var_damp_scale=1.0, use_reward=False,
        reward_up=1.03, reward_down=0.90, momentum_up=0.01, momentum_down=0.90, patience=20,
        big_drop=0.5, cooldown=50, use_cosine=False, T0=200, T_mult=2, eta_min_scale=0.1,
        lr_min=1e-7, lr_max=10.0, momentum_min=0.0, momentum_max=0.999, last_epoch=-1,
    )  # fmt: skip
    AdaptiveScheduler(
        optimizer, use_reward=True, use_cosine=True, loss_beta=0.5, reward_beta=0.5, var_window=5,
        up_factor=1.5, down_factor=0.5, min_rel_improve=0.1, var_damp_base=2.0, var_damp_scale=2.0,
        reward_up=1.5, reward_down=0.5, momentum_up=0.1, momentum_down=0.5, patience=2,
        big_drop=0.1, cooldown=5, T0=20, T_mult=3, eta_min_scale=0.5, lr_min=1e-5, lr_max=1.0,
        momentum_min=0.1, momentum_max=0.9,
    )  # fmt: skip
    AdaptiveScheduler(
        optimizer, lr_rule="grad_norm", momentum_rule="exp", reward_rule="scaling",
        ema_reward_beta=0.9, min_lr=1e-6, max_lr=0.5, min_momentum=0.0, max_momentum=0.99,
    )  # fmt: skip
    for rule in ("scaling", "trend", "variance", "kelly", "none"):
        RewardAdaptiveScheduler(optimizer, rule=rule, ema_reward_beta=0.9, min_lr=1e-6, max_lr=1.0)
    with pytest.raises(TypeError, match="upfactor"):
        AdaptiveScheduler(optimizer, upfactor=1.1)
    with pytest.raises(ValueError, match="load_state_dict"):
        AdaptiveScheduler(optimizer, last_epoch=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda o: RewardAdaptiveScheduler(o, up_factor=1.2),
            "no chosen rule reads up_factor; these do: lr_rule trend$",
        ),
        (lambda o: AdaptiveScheduler(o, T0=100), "no chosen rule reads cycle_length; these do: "),
        (
            lambda o: AdaptiveScheduler(o, eta_min_scale=0.5),
            "no chosen rule reads eta_min_scale; these do: ",
        ),
        (lambda o: AdaptiveScheduler(o, use_cosine=True, T0=0), "cycle_length is 0; it must be"),
        (lambda o: AdaptiveScheduler(o, use_cosine=True, T_mult=0.5), "cycle_mult is 0.5"),
        (
            lambda o: AdaptiveScheduler(o, use_reward=True, reward_rule="none"),
            'use_reward contradicts reward_rule "none"',
        ),
    ],
)
def test_arguments_that_nothing_would_read_are_refused(make, message, caplog):
    optimizer = SGD(linear().parameters(), lr=0.5, momentum=0.5)
    if message == "no chosen rule reads cycle_length; these do: ":
        make(optimizer)
        assert message in caplog.text
    else:
        with pytest.raises(ValueError, match=message):
            make(optimizer)


def test_a_reward_scheduler_says_what_it_does_not_take():
    optimizer = SGD(linear().parameters(), lr=0.5)
    with pytest.raises(TypeError, match=r"^RewardAdaptiveScheduler takes no lr_rule: its rate "):
        RewardAdaptiveScheduler(optimizer, lr_rule="trend")


def test_help_of_schedulers_is_true():
    text = inspect.cleandoc(AdaptiveScheduler.__doc__ or "")
    (said,) = (line for line in text.splitlines() if line.startswith("lr_rule"))
    listed, _, default = said.removeprefix("lr_rule: ").partition("; ")
    assert default == "default trend + variance + patience"
    every = {rule.name for rule in RULES if rule.argument == "lr_rule" and rule.reads != "kl"}
    assert {"loss_decay", "trend", "cosine_restart"} < every == {*listed.split(", ")}
    for rule in listed.split(", "):
        AdaptiveScheduler(SGD(linear().parameters(), lr=0.5), lr_rule=rule)
    assert text.count("eta_min_scale") == 1
    assert "\neta_min_scale = 0.1: lowest factor of a schedule; in [0, 1]\n" in text


@pytest.mark.parametrize("kind", [AdaptiveScheduler, RewardAdaptiveScheduler])
def test_parameters_are_no_optimizer(kind):
    with pytest.raises(TypeError, match=r"^optimizer is a generator; it must be an optimizer"):
        kind(linear().parameters())


def test_what_is_no_state_of_a_scheduler():
    with pytest.raises(ValueError, match="no state of an AdaptiveScheduler: it has no controller"):
        AdaptiveScheduler(SGD(linear().parameters(), lr=0.5)).load_state_dict({})


@pytest.mark.parametrize(("one", "other"), ALIASES.items())
def test_an_argument_by_both_of_its_names_is_refused(one, other):
    optimizer = SGD(linear().parameters(), lr=0.5, momentum=0.5)
    with pytest.raises(TypeError, match=f"^{one} and {other} are two names of one"):
        AdaptiveScheduler(optimizer, **{one: 0.9, other: 0.9})


def test_use_cosine_adds_to_the_rules_that_are_named():
    optimizer = SGD(linear().parameters(), lr=0.5)
    scheduler = AdaptiveScheduler(optimizer, lr_rule="trend", use_cosine=True)
    rules = [active.rule.name for active in scheduler.controller.rules]
    assert rules == ["trend", "cosine_restart"]


def test_groups_that_share_one_rate_are_no_second_writer():
    rate = torch.tensor(0.5)
    groups = [{"params": list(linear().parameters()), "lr": rate} for _ in range(2)]
    scheduler = AdaptiveScheduler(
        SGD(groups), lr_rule="loss_decay", loss_k=1.0, loss_beta=0.0, memory=math.inf,
        max_drift=100.0,
    )  # fmt: skip
    assert scheduler.step_loss(1.0) == [0.25, 0.25]
    assert scheduler.step_loss(3.0) == [0.0625, 0.0625] and rate.item() == 0.0625


def test_a_bare_step_after_observe_is_no_second_step_of_time():
    """Trainers step the scheduler they are given, also where it has observed already."""
    optimizer = SGD(linear().parameters(), lr=0.5)
    scheduler = AdaptiveScheduler(optimizer, lr_rule="cyclical", cycle_length=4, eta_min_scale=0.2)
    for expected in (0.3, 0.1, 0.3):
        optimizer.step()
        scheduler.observe(loss=1.0)
        scheduler.step()
        assert scheduler.get_last_lr() == pytest.approx([expected])
    for expected in (0.5, 0.3):
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == pytest.approx([expected]), "time passes without news"
    assert scheduler.last_epoch == scheduler.controller.step == 5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_as_the_original_does(copied):
    optimizer = SGD(linear().parameters(), lr=0.5)
    scheduler = AdaptiveScheduler(optimizer, lr_rule="cyclical", cycle_length=4)
    optimizer.step()
    scheduler.observe(loss=1.0)
    pairs = [(optimizer, scheduler), copied((optimizer, scheduler))]
    assert pairs[1][1].optimizer is pairs[1][0] is not optimizer
    rates = []
    for one, its in pairs:
        rates.append([])
        for _ in range(3):  # time passes without news
            one.step()
            its.step()
            rates[-1] += its.get_last_lr()
    assert rates[0] == rates[1] and len({*rates[0]}) == 3


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
@pytest.mark.parametrize("front", ["optimizer", "scheduler", "both", "online"])
@pytest.mark.filterwarnings("ignore")
def test_inside_trls_trainers(kind, front, tmp_path):
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
    if front == "optimizer":
        optimizer = watched = AdaptiveOptimizer(base, reward_rule="trend", **rule)
    elif front in ("scheduler", "both"):
        optimizer, watched = base, RewardAdaptiveScheduler(base, rule="trend", **rule)
    else:  # its head is zero: each tensor at the rate of all
        base = OnlineAdamW(model.parameters(), lr=1e-3, weights=None, learn=False)
        optimizer = watched = AdaptiveOptimizer(base, reward_rule="trend", **rule)
        base.register_step_post_hook(
            lambda opt, *_: rates.append(next(iter(opt.rates.values())).item())
        )
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=4,
        max_completion_length=4, report_to=[], use_cpu=True, save_strategy="no", bf16=False,
        lr_scheduler_type="linear", learning_rate=1e-3, disable_tqdm=True,
        gradient_checkpointing=False, beta=0.0, logging_steps=1,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=tap,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        optimizers=(optimizer, watched if front == "both" else None),
        callbacks=[RewardObserveCallback(watched, tap.last)],
    )
    trainer.train()
    # linear 1, 3/4, 1/2, 1/4; the reward has risen before the third step and again
    linear = [1.0] * 4 if front == "both" else [1.0, 0.75, 0.5, 0.25]
    assert rates == pytest.approx([1e-3 * a * b for a, b in zip(linear, (1, 1, 2, 4), strict=True)])
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx(rates), "the log has the rate that the step took"
    assert watched.controller.step == 4, "once per step"
    if front != "online":
        now = float(base.param_groups[0]["lr"]) * watched.controller.ratio
        assert (watched.lr if front == "optimizer" else watched.get_lr()[0]) == pytest.approx(now)


@pytest.mark.parametrize(
    ("rewards", "differ"),
    [
        ([1.0, 1.0, 0.0, 0.0], False),
        ([1.0, None, math.nan, 0.0], False),
        ([0.0, 0.0, 0.0, 1.0], True),
        ([None] * 4, False),
    ],
)
def test_a_tap_says_whether_completions_of_one_prompt_differ(rewards, differ):
    tap = RewardTap(lambda **_: rewards)
    tap(prompts=["one", "one", "two", "two"], completions=["a"] * 4)
    assert tap.informative() is differ


def test_a_step_that_was_left_out_leaves_the_logged_rates():
    net = linear()
    optimizer = AdaptiveOptimizer(SGD(net.parameters(), lr=0.5), "trust_region")
    callback, schedule = RewardObserveCallback(optimizer, lambda step: None), SimpleNamespace()
    schedule._last_lr = [0.1]
    for gradient, kls, logged in (
        (math.nan, [], 0.1), (1.0, [0.016, 0.004], 0.25), (math.nan, [], 0.25),
    ):  # fmt: skip
        for p in net.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.step(measure_kl=lambda kls=kls: kls.pop(0))
        callback.log_rates(schedule)
        assert schedule._last_lr == [pytest.approx(logged)]


def test_a_tap_takes_tensors_for_numbers():
    for values, differ in (([1.0, 1.0], False), ([1.0, 0.0], True)):
        for given in (torch.tensor(values), [torch.tensor(x) for x in values]):
            tap = RewardTap(lambda given=given, **_: given)
            assert tap(prompts=["a", "a"], completions=["x", "y"]) is given
            assert tap.informative() is differ
            assert type(tap.last()) is float and tap.last() == sum(values) / 2


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_resumes_a_scheduler_that_only_the_callback_has(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, tokenizer, _ = texts(tmp_path)
    start = copy.deepcopy(model.state_dict())
    ids = tokenizer("This film is one that I like").input_ids

    def train(steps: int, resume: bool | str, **more):
        model.load_state_dict(start)
        base = SGD(model.parameters(), lr=1e-3, momentum=0.5)
        rates: list[float] = []
        base.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
        scheduler = RewardAdaptiveScheduler(base, "kelly+trend", trend_window=3)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=2, save_steps=3,
                lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, **more,
            ),
            train_dataset=[{"input_ids": ids, "labels": ids}] * 16,
            optimizers=(base, None),
            callbacks=[RewardObserveCallback(scheduler, lambda step: 0.5 * step)],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return scheduler.state_dict(), rates

    whole, rates = train(6, resume=False)
    train(3, resume=False)
    for more in ({}, {"restore_callback_states_from_checkpoint": True}):
        resumed, later = train(6, resume=str(tmp_path / "run" / "checkpoint-3"), **more)
        assert resumed == whole and later == rates[3:]
    assert whole["controller"]["step"] == 6 and len({*rates}) == 6
    fresh, again = train(6, resume=False)
    assert (fresh, again) == (whole, rates), "without resuming it begins anew"


def test_a_tap_on_an_async_reward_is_async_and_remembers_alike():
    import inspect

    async def reward(completions, **_):
        return [1.0, None, 3.0]

    class Judge:
        async def __call__(self, completions, **_):
            return [5.0]

    tap, judge = RewardTap(reward), RewardTap(Judge())
    assert tap.last() is None and tap.__name__ == "reward"
    for one in (tap, judge):
        assert isinstance(one, RewardTap)
        assert inspect.iscoroutinefunction(type(one).__call__), "what TRL and our composite ask"
    assert asyncio.run(tap(completions=["a"] * 3)) == [1.0, None, 3.0]
    assert asyncio.run(judge(completions=["a"])) == [5.0]
    assert (tap.last(), judge.last()) == (2.0, 5.0)
    assert not inspect.iscoroutinefunction(RewardTap(lambda completions: [1.0]).__call__)
    bound = RewardTap(partial(Judge(), prompts=[]))
    assert asyncio.run(bound(completions=["a"])) == [5.0] and bound.last() == 5.0
    twin = copy.deepcopy(judge)
    assert type(twin) is type(judge) and twin.last() == 5.0


@pytest.mark.filterwarnings("ignore")
def test_wrapping_step_as_the_document_does_with_trl(tmp_path):
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
    assert sched.controller.step == 3, "the trainer steps it too, which is no second step of time"
    lean = 1 - 1 / 100
    twice = (2.0**lean * 2.0) ** lean
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-5 * min(twice, 3.0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "observes"), [("RLOO", True), ("GRPO", True), ("RLOO", False)])
def test_the_trust_region_inside_trls_trainers(kind, observes, tmp_path):
    """Started at a rate of 1: the same trust region, and the log has the rates that steps took,
    whichever of the callbacks are there."""
    import trl

    model, tokenizer, dataset = texts(tmp_path)
    batches = []

    def every_other_batch_says_something(completions, **_):
        batches.append(completions)
        return [float(k * (len(batches) % 2)) for k in range(len(completions))]

    tap = RewardTap(every_other_batch_says_something)
    optimizer = AdaptiveOptimizer(AdamMini(model.parameters(), lr=1.0), "trust_region", steps=4)
    infos = []
    optimizer.register_step_post_hook(lambda *_: infos.append(optimizer.info))
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=4,
        max_completion_length=4, report_to=[], use_cpu=True, save_strategy="no", bf16=False,
        lr_scheduler_type="constant", learning_rate=1.0, disable_tqdm=True,
        gradient_checkpointing=False, beta=0.0, logging_steps=1,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=tap,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[RewardObserveCallback(optimizer, tap.last)] if observes else [],
    )
    trainer.add_callback(
        TrustRegionCallback(optimizer, tokenizer, tap.texts, informative=tap.informative)
    )
    trainer.train()
    assert len(infos) == len(batches) == 4 and infos[0].scale < 0.1
    assert all(info.kl <= 2 * info.target for info in infos if info.kl is not None)
    assert optimizer.trust_region.informative_steps == 1, "the third; the first has no alignment"
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx([info.lr for info in infos])


@pytest.mark.parametrize("given", [True, False], ids=["keywords", "positions"])
@pytest.mark.parametrize("named", ["prompts", "completions", "neither"])
def test_a_tap_takes_a_batch_by_position_too(given, named):
    rewards = {
        "prompts": lambda prompts, completions, **_: [0.0, 1.0],
        "completions": lambda completions, prompts, **_: [0.0, 1.0],
        "neither": lambda *_, **__: [0.0, 1.0],
    }
    tap, batch = RewardTap(rewards[named]), {"prompts": ["a", "a"], "completions": ["x", "y"]}
    order = ["completions", "prompts"] if named == "completions" else ["prompts", "completions"]
    values = tap(**batch) if given else tap(*(batch[name] for name in order))
    assert values == [0.0, 1.0]
    assert tap.texts() == [("a", "x"), ("a", "y")] and tap.informative()


def test_an_async_tap_takes_a_batch_by_position_too():
    async def reward(prompts, completions, **_):
        return [0.0, 1.0]

    tap = RewardTap(reward)
    assert asyncio.run(tap(["a", "a"], ["x", "y"])) == [0.0, 1.0]
    assert tap.texts() == [("a", "x"), ("a", "y")] and tap.informative()


def test_a_tap_reads_messages_of_parts_and_without_content():
    def parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    tap = RewardTap(lambda **_: [0.0, 1.0])
    image = {"type": "image", "image": "a.png"}
    prompt = [{"role": "user", "content": [image, *parts("a", "b")]}]
    tap(
        prompts=[prompt, prompt],
        completions=[
            [{"role": "assistant", "content": parts("x")}],
            [
                {"role": "assistant", "content": None, "tool_calls": []},
                {"role": "tool", "content": "4"},
                {"role": "assistant", "content": "y"},
            ],
        ],
    )
    assert tap.texts() == [("ab", "x"), ("ab", "\n4\ny")] and tap.informative()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("kind", ["RLOO", "GRPO"])
def test_an_evaluation_leaves_the_batch_of_the_training_alone(kind, asynchronous, tmp_path):
    """Each batch serves two steps, and an evaluation comes between them."""
    import trl
    from datasets import Dataset

    model, tokenizer, dataset = texts(tmp_path)
    asked = []

    def reward(prompts, completions, **_):
        evaluates = prompts[0].startswith("EVAL")
        asked.append("eval" if evaluates else "train")
        own = [0.0, 1.0] if not evaluates else [-5.0, -5.0]
        return own * (len(completions) // 2)

    async def waiting(**batch):
        return reward(**batch)

    tap = RewardTap(waiting if asynchronous else reward)
    optimizer = AdaptiveOptimizer(AdamMini(model.parameters()), "trust_region", steps=4)
    again = {"steps_per_generation": 2} if kind == "RLOO" else {"num_iterations": 2}
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_steps=4,
        max_completion_length=4, report_to=[], use_cpu=True, save_strategy="no", bf16=False,
        lr_scheduler_type="constant", disable_tqdm=True, gradient_checkpointing=False, beta=0.0,
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2, num_generations_eval=1,
        **again,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=tap,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=Dataset.from_dict({"prompt": ["EVAL one", "EVAL two"]}),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    seen = []

    def last(step):
        is_own = not any("EVAL" in prompt for prompt, _ in tap.texts())
        seen.append((tap.last(), optimizer.informative, is_own))
        return tap.last()

    trainer.add_callback(TrustRegionCallback(optimizer, tokenizer, tap.texts, tap.informative))
    trainer.add_callback(RewardObserveCallback(optimizer, last))
    trainer.train()
    assert asked == ["train", "eval", "eval"] * 2, "or no evaluation is before a step that reuses"
    assert seen == [(0.5, True, True)] * 4


def test_the_reward_scheduler_says_what_its_rule_is_called():
    with pytest.raises(TypeError, match="RewardAdaptiveScheduler calls reward_rule rule"):
        RewardAdaptiveScheduler(torch.optim.SGD([torch.zeros(1)], lr=1.0), reward_rule="trend")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", [True, False])
def test_the_callback_measures_the_ends_of_texts_at_the_trainers_temperature(named, tmp_path):
    """Against the KL of each text alone, without padding, where it predicts what counts."""
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from trl import RLOOConfig

    model, tokenizer, _ = texts(tmp_path)
    own = ["I saw it with my brother and we", "Yes", ("This", " film"), ("I saw it with my", "")]
    optimizer = AdaptiveOptimizer(SGD(model.parameters(), lr=0.1), "trust_region")
    temperature = 0.5 if named else None
    callback = TrustRegionCallback(
        optimizer, tokenizer, lambda: own, length=3, temperature=temperature
    )

    def logprobs():
        """The last three of a text; of a pair from the last token of the prompt on."""
        model.eval()
        found = []
        for text, count in ((own[0], 3), ("Yes", 3), ("This film", 2), ("I saw it with my", 1)):
            logits = model(tokenizer(text, return_tensors="pt").input_ids[:, -3:]).logits[0]
            found.append((logits[-count:] / 0.5).log_softmax(-1))
        return torch.cat(found).detach()

    assert len(tokenizer("This film").input_ids) == 2
    before = logprobs()
    kind, more = (TrainingArguments, {}) if named else (RLOOConfig, {"temperature": 0.5})
    arguments = kind(str(tmp_path), use_cpu=True, report_to=[], bf16=False, **more)
    callback.on_pre_optimizer_step(arguments, TrainerState(), TrainerControl(), model=model)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    now = logprobs()
    want = (before.exp() * (before - now)).sum(-1).mean().item()
    assert want > 0.001 and callback.measure_kl() == pytest.approx(want, rel=1e-4)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} and all that the template adds\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPTS = {
    "a text": "This film is one that I saw with my brother",
    "a conversation": [
        {"role": "system", "content": "You are a critic"},
        {"role": "user", "content": "This film"},
    ],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("kind", ["RLOO", "GRPO"])
def test_the_kl_inside_trls_trainers_is_that_of_what_was_sampled(kind, prompt, tmp_path):
    """In the context that it was sampled in, of all completions, where each token is predicted."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    model, tokenizer, _ = texts(tmp_path)
    tokenizer.chat_template = TEMPLATE
    sampled: list[list[int]] = []

    def reward(prompts, completion_ids, **_):
        sampled[:] = completion_ids
        return [float(k) for k in range(len(completion_ids))]

    def before_completions() -> list[int]:
        own = PROMPTS[prompt]
        if isinstance(own, str):
            return tokenizer(own).input_ids
        text = tokenizer.apply_chat_template(own, add_generation_prompt=True, tokenize=False)
        return tokenizer(text).input_ids

    def logprobs() -> torch.Tensor:
        found = []
        for ids in sampled:
            model.eval()
            whole = torch.tensor([before_completions() + ids])
            with torch.no_grad():
                found.append(model(whole).logits[0, -len(ids) - 1 : -1].log_softmax(-1))
            model.train()
        return torch.cat(found)

    tap = RewardTap(reward)
    optimizer = AdaptiveOptimizer(AdamMini(model.parameters(), lr=1.0), "trust_region")
    want = []

    class Exact(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            self.before = logprobs()

        def on_optimizer_step(self, *_, **__):
            kl = self.before.exp() * (self.before - logprobs())
            want.append((optimizer.info.kl, kl.sum(-1).mean().item()))

    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_steps=2,
        max_completion_length=4, report_to=[], use_cpu=True, save_strategy="no", bf16=False,
        lr_scheduler_type="constant", disable_tqdm=True, gradient_checkpointing=False,
        beta=0.0,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=tap,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [PROMPTS[prompt]] * 8}),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[Exact()],
    )
    trainer.add_callback(TrustRegionCallback(optimizer, tokenizer, tap.texts, tap.informative))
    trainer.train()
    assert len(want) == 2 and all(kl > 1e-4 for kl, _ in want)
    assert [kl for kl, _ in want] == pytest.approx([exact for _, exact in want], rel=1e-4)
    assert copy.deepcopy(tap).texts() == tap.texts() == [(tap.texts()[0][0], x) for x in sampled]


def test_the_whole_of_a_long_text_is_its_context(tmp_path):
    """As many tokens as the model has positions; 64 here."""
    model, tokenizer, _ = texts(tmp_path)
    long = tokenizer("and so I went to see it " * 12 + "again").input_ids
    optimizer = AdaptiveOptimizer(SGD(model.parameters(), lr=0.1), "trust_region")
    callback = TrustRegionCallback(optimizer, tokenizer, lambda: [(long[:-2], long[-2:])])
    callback.on_pre_optimizer_step(SimpleNamespace(device="cpu"), None, None, model=model)
    whole = torch.tensor([long[-64:]])
    assert len(long) > 64 and torch.equal(callback.inputs["input_ids"], whole)
    want = model.eval()(whole).logits[0, -3:-1].log_softmax(-1)
    torch.testing.assert_close(callback.old, want.detach())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": SGD([torch.zeros(1)])}, "optimizer is a SGD; it must be an Adaptive"),
        ({"rule": "trend"}, "no rule of the optimizer uses the KL of an update: make an Adap"),
        ({"rule": "none"}, "no rule of the optimizer uses the KL of an update: make an Adap"),
        ({"texts": ["a"]}, r"texts is \['a'\]; it must be a function, such as tap.texts"),
        ({"count": -1}, "count is -1; it must be a whole number, at least 1"),
        ({"count": 2.5}, "count is 2.5; it must be a whole number, at least 1"),
        ({"length": 0}, "length is 0; it must be a whole number, at least 1"),
        ({"temperature": 0}, r"temperature is 0; it must be in \(0, inf\)"),
        ({"temperature": -1.0}, r"temperature is -1.0; it must be in \(0, inf\)"),
    ],
)
def test_what_the_callback_refuses(wrong, message):
    own = AdaptiveOptimizer(SGD([torch.zeros(1)]), wrong.pop("rule", "trust_region"))
    given = {"optimizer": own, "tokenizer": None, "texts": list} | wrong
    with pytest.raises((TypeError, ValueError), match=message):
        TrustRegionCallback(**given)


@pytest.mark.parametrize("empty", [["", ""], [("", "")], [("This film", [])]])
def test_texts_that_are_empty_are_told(empty, tmp_path):
    model, tokenizer, _ = texts(tmp_path)
    optimizer = AdaptiveOptimizer(SGD(model.parameters(), lr=0.1), "trust_region")
    callback = TrustRegionCallback(optimizer, tokenizer, lambda: empty)
    with pytest.raises(ValueError, match="gave only empty texts or completions"):
        callback.on_pre_optimizer_step(SimpleNamespace(device="cpu"), None, None, model=model)


@pytest.mark.parametrize("name", ["use_reward", "use_cosine"])
def test_a_word_is_neither_true_nor_false(name):
    with pytest.raises(TypeError, match=f"{name} is 'no'; it must be True or False"):
        AdaptiveScheduler(SGD([torch.zeros(1)]), **{name: "no"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((SGD([torch.zeros(1)]), float), "scheduler is SGD .*it must be an AdaptiveScheduler"),
        ((AdaptiveScheduler(SGD([torch.zeros(1)])), 3), "reward_fn is 3; it must be a function"),
    ],
)
def test_a_callback_of_something_else_is_refused(arguments, said):
    with pytest.raises(TypeError, match=f"(?s){said}"):
        RewardObserveCallback(*arguments)
    with pytest.raises(TypeError, match="reward is 3; it must be a reward function"):
        RewardTap(3)


def test_a_callback_whose_rewards_nothing_reads_says_so(caplog):
    RewardObserveCallback(AdaptiveOptimizer(SGD([torch.zeros(1)]), reward_rule="trend"), float)
    RewardObserveCallback(RewardAdaptiveScheduler(SGD([torch.zeros(1)])), float)
    assert not caplog.records
    RewardObserveCallback(AdaptiveOptimizer(SGD([torch.zeros(1)]), "loss_decay"), float)
    RewardObserveCallback(AdaptiveScheduler(SGD([torch.zeros(1)])), float)
    told = 'RewardObserveCallback: no rule reads rewards. Choose a reward_rule, such as "trend"'
    assert [record.getMessage() for record in caplog.records] == [told] * 2
