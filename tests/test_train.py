"""Whole runs of train.py on a tiny model: what they leave, every precision, reloading."""

import json
import os
import platform
import pty
import signal
import sys
import termios
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, PROMPTS, around_steps, read_jsonl, with_samples
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptiverl.files.process import StopSignal
from adaptiverl.training.guards import Guards

EMBEDDED = {
    "MODEL": "adaptiverl/assets/policy",
    "REWARDS": [{"TYPE": "classifier", "MODEL": "adaptiverl/assets/sentiment"}],
}


def test_a_run_leaves_all_it_says(run, settings):
    out = Path(settings["OUTPUT_DIR"])
    keys = settings | {"STEPS": 4, "SAVE_EVERY": 2, "LOG_EVERY": 2, "EVAL_EVERY": 3}
    result = run(keys | {"EVAL_FILE": settings["TRAIN_FILE"]})
    assert result.returncode == 0, result.stderr
    assert result.stderr == (
        "WARNING: 5 of 5 prompts of EVAL_FILE are also in TRAIN_FILE: what is evaluated on is "
        "trained on\n"
    )
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock", "best", "config.json", "controller.jsonl", "environment.jsonl", "final",
        "metrics.jsonl", "progress.jsonl", "report.html", "samples.jsonl", "step-000002",
        "step-000004",
    ]  # fmt: skip
    resolved = json.loads((out / "config.json").read_text())
    assert resolved["TEMPERATURE"] == 1.0, "defaults are written out"

    metrics = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    always = {
        "step", "reward", "reward_std", "frac_reward_zero_std", "rewards/regex/mean",
        "rewards/length/mean", "loss", "kl", "kl_per_completion", "kl_coef", "entropy",
        "grad_norm", "lr", "momentum",
        "completions/mean_length", "completions/clipped_ratio", "tokens_per_second",
        "seconds/rollout", "seconds/reward",
        "seconds/reference", "seconds/update", "skipped", "updates_scaled", "update_kl",
        "update_kl_target", "update_scale", "update_signal_to_noise", "completions/distinct_1",
        "completions/distinct_2", "completions/repetition", "rewards/regex/share",
        "completions/equal_within_prompts", "completions/equal_across_prompts",
        "rewards/length/share", "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
    }  # fmt: skip
    evaluated = {
        "eval/reward", "eval/rewards/regex/mean", "eval/rewards/length/mean", "eval/score",
        "eval/kl_per_completion",
    }  # fmt: skip
    assert [set(row) for row in metrics] == [always, always, always | evaluated, always]
    lines = result.stdout.splitlines()
    for rows, line in zip((metrics[:1], metrics[1:2], metrics[2:]), lines, strict=False):
        reward, loss = (sum(row[name] for row in rows) / len(rows) for name in ("reward", "loss"))
        want = f"Step {rows[-1]['step']}/4 | Reward: {reward:.2f} | Loss: {loss:.4f} | "
        assert line.startswith(want + f"LR: {rows[-1]['lr']:.3g} | Momentum: 0.900")
    assert [" | ETA: 00:" in line for line in lines[:3]] == [True, True, False]
    assert lines[3] == f"finished: 4 steps, the model is in {out / 'final'}"
    score = metrics[2]["eval/score"]
    said = f"best: step 3 (eval/score {score:.3f}), the model is in {out / 'best'}"
    assert lines[4] == said
    assert lines[5] == f"report: {out / 'report.html'}"
    assert lines[6].endswith(f"adaptiverl doctor {out}")
    assert lines[7].endswith(f"adaptiverl generate {out}")

    samples = read_jsonl(out / "samples.jsonl")
    assert [row["step"] for row in samples] == [step for step in (1, 2, 3, 4) for _ in range(8)]
    first = [row for row in samples if row["step"] == 1]
    assert metrics[0]["reward"] == pytest.approx(sum(r["reward"] for r in first) / 8)
    for row in samples:
        assert len(row["completion_ids"]) == len(row["logprobs"])
        assert row["reward"] == pytest.approx(row["rewards/regex"] + row["rewards/length"])


def test_samples_logprobs_are_those_of_an_unpadded_pass_of_the_first_policy(run, settings, tiny):
    """LRATE 0 keeps the first policy, so every row can be checked; EOS is made likely."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(0.5)  # every logit gains 0.5 · Σ of its embedding:
        model.transformer.wte.weight[tokenizer.eos_token_id] = 0.5  # 8 for EOS, one token in ten
    eager = Path(settings["OUTPUT_DIR"]).with_name("eager")
    model.eval().save_pretrained(eager)
    tokenizer.save_pretrained(eager)
    result = run(settings | {"MODEL": str(eager), "LRATE": 0, "STEPS": 6})
    assert result.returncode == 0, result.stderr
    rows = read_jsonl(Path(settings["OUTPUT_DIR"]) / "samples.jsonl")
    ended = [row for row in rows if row["completion_ids"][-1] == tokenizer.eos_token_id]
    assert any(len(row["logprobs"]) < 8 for row in ended), "no completion ended early"
    assert len({len(tokenizer(row["prompt"]).input_ids) for row in rows}) > 2
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor([prompt + row["completion_ids"]])
        with torch.no_grad():
            table = model(ids).logits[0].log_softmax(-1)
        want = [table[len(prompt) - 1 + t, i].item() for t, i in enumerate(row["completion_ids"])]
        assert row["logprobs"] == pytest.approx(want, abs=1e-4)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft corrects it itself
@pytest.mark.parametrize(
    "keys",
    [
        {"FULLTUNE": False},
        {"FULLTUNE": False, "LOAD_4BIT": True},
        {"FULLTUNE": False, "LOAD_8BIT": True},
        {"BF16": True},
    ],
    ids=lambda keys: "+".join(keys),
)
def test_every_precision_trains_saves_resumes_and_loads(main, settings, tiny, keys):
    """In this process: peft and bitsandbytes take long to import."""
    out = Path(settings["OUTPUT_DIR"])
    keys = settings | keys | {"STEPS": 2, "SAVE_EVERY": 1}
    assert main(keys) == 0
    assert main(keys | {"STEPS": 3, "RESUME": "auto"}) == 0
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=0.02)
    ids = torch.tensor([[1, 2, 3]])
    trained = AutoModelForCausalLM.from_pretrained(out / "final", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(tiny)
    assert not torch.equal(trained(ids).logits, start(ids).logits)


def test_full_tune_and_lora_start_from_the_same_samples(main, settings):
    """LoRA's second factor starts at zero: the first step is that of the bare model."""
    out = Path(settings["OUTPUT_DIR"])
    rows = []
    for full in (True, False):
        assert main(settings | {"FULLTUNE": full, "STEPS": 1, "OUTPUT_DIR": f"{out}-{full}"}) == 0
        rows.append(read_jsonl(Path(f"{out}-{full}") / "samples.jsonl"))
    for full, lora in zip(*rows, strict=True):
        assert full["completion_ids"] == lora["completion_ids"]


@pytest.mark.parametrize("optim", ["sgd", "rmsprop", "adamw_8bit"])
def test_every_optimizer_moves_the_policy_and_logs_its_momentum(main, settings, optim):
    assert main(settings | {"OPTIM": optim, "MOMENTUM": 0.8, "LRATE": 1e-2, "STEPS": 2}) == 0
    rows = read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")
    assert [row["momentum"] for row in rows] == [0.8, 0.8]
    assert rows[1]["kl"] != pytest.approx(rows[0]["kl"], abs=1e-6)


def test_pieces_of_a_batch_give_the_gradient_of_the_whole(main, settings):
    """With SGD: AdamW's first steps turn rounding errors of tiny gradients into whole steps."""
    out = settings["OUTPUT_DIR"]
    rows = []
    for pieces in (1, 4):
        keys = {"GRAD_ACCUM": pieces, "OUTPUT_DIR": f"{out}-{pieces}", "KL_ESTIMATOR": "k3"}
        assert main(settings | keys | {"OPTIM": "sgd", "LRATE": 1e-2}) == 0
        rows.append(read_jsonl(Path(f"{out}-{pieces}") / "metrics.jsonl"))
    for whole, parts in zip(*rows, strict=True):
        for name in ("loss", "entropy", "grad_norm", "reward", "kl"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-4), name


def test_kl_coefficient_follows_its_target(main, settings):
    keys = {"KL_COEF_TARGET": 1e-6, "KL_COEF": 0.5, "LRATE": 1e-2, "KL_ESTIMATOR": "k3"}
    assert main(settings | keys) == 0
    coefficients = [
        row["kl_coef"] for row in read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")
    ]
    assert coefficients == pytest.approx([0.5, 0.45, 0.495])  # no KL yet: down; then far above: up


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(run_parts, settings):
    def poisoned(parts):
        next(parts.policy.parameters()).register_hook(
            lambda gradient: gradient * (float("nan") if parts.progress.step == 2 else 1.0)
        )
        return parts

    assert run_parts(settings, poisoned) == 0
    rows = read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 1]
    assert rows[1]["grad_norm"] is None, "JSON has no NaN"
    final = AutoModelForCausalLM.from_pretrained(Path(settings["OUTPUT_DIR"]) / "final")
    assert all(parameter.isfinite().all() for parameter in final.parameters())


@pytest.mark.parametrize("saved", [False, True])
def test_a_broken_policy_ends_the_run_and_is_not_saved(run_parts, settings, saved):
    """After step 2 its weights are NaN: found when it is saved, or when it samples again."""
    out = Path(settings["OUTPUT_DIR"])

    def broken(parts):
        class Breaking(Guards):
            """The last to see a step before it is written."""

            def look(self, step, *arguments):
                super().look(step, *arguments)
                if step == 2:
                    with torch.no_grad():
                        parts.policy.lm.transformer.ln_f.bias.fill_(float("nan"))

        old = parts.guards
        return replace(parts, guards=Breaking(old.config, old.last_step, old.allowed_gap))

    keys = settings | {"SAVE_EVERY": int(saved), "ON_COLLAPSE": "stop"}
    assert run_parts(keys, broken) == 3
    (event,) = read_jsonl(out / "events.jsonl")
    step, what = (2, "weights") if saved else (3, "log-probabilities")
    assert (event["step"], event["kind"], event["action"]) == (step, "nan", "stop")
    assert event["message"].startswith(f"the policy's {what} are not finite (NaN)")
    assert event["message"].endswith(
        "TRUST_REGION_KL. The run ends here. RESUME=auto would make the same steps again: change "
        "that in a new run, with the same MODEL and another OUTPUT_DIR"
    )
    assert [p.name for p in out.glob("step-*")] == ["step-000001"] * saved
    assert not (out / "final").exists()
    assert len(read_jsonl(out / "metrics.jsonl")) == 2


def test_a_model_that_is_broken_is_refused(main, settings, tiny, tmp_path, capsys):
    lm = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        lm.transformer.h[0].ln_1.weight[3] = float("inf")
    lm.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "broken")
    assert main(settings | {"MODEL": str(tmp_path / "broken")}) == 2
    assert "its log-probabilities are not finite (NaN). Likely" in capsys.readouterr().err


def test_no_gradient_from_different_rewards_is_told_once(run_parts, settings, caplog):
    """As where layers have no backward pass and no error says so."""

    class Severed(nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def forward(self, rollout):
            measured = self.policy(rollout)
            return measured._replace(score=measured.score * 0)

    def severed(parts):
        return replace(parts, policy=Severed(parts.policy))

    assert run_parts(settings | {"STEPS": 3, "KL_COEF": 0}, severed) == 0
    rows = read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")
    assert [row["grad_norm"] for row in rows] == [0, 0, 0]
    said = [text for text in caplog.messages if "the gradient is exactly 0" in text]
    assert len(said) == 1 and "layers without a backward pass" in said[0]


def test_equal_rewards_are_no_lost_gradient(main, settings, caplog):
    keys = {"REWARDS": [{"TYPE": "regex", "PATTERNS": "^$", "NEGATE": True}], "KL_COEF": 0}
    assert main(settings | keys) == 0
    assert not any("gradient is exactly 0" in text for text in caplog.messages)


def test_sampling_that_drifts_from_the_loss_is_measured_and_told_once(run_parts, settings, caplog):
    """From step 2 on, one token in each completion is 0.4 nats off."""

    def drifting(parts):
        def drift(rollout):
            rollout.logprobs[:, 0] += 0.4 * (parts.progress.step > 1)

        return with_samples(parts, drift)

    assert run_parts(settings | {"GRAD_ACCUM": 2}, drifting) == 0
    rows = read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")
    mean = [row["sampling/sampling_logp_difference/mean"] for row in rows]
    largest = [row["sampling/sampling_logp_difference/max"] for row in rows]
    want = [0.4 / row["completions/mean_length"] * (row["step"] > 1) for row in rows]
    assert mean == pytest.approx(want, abs=1e-4)
    assert largest == pytest.approx([0, 0.4, 0.4], abs=1e-4)
    (said,) = [text for text in caplog.messages if "samples and of the loss differ" in text]
    assert said.startswith("step 2: ") and "recurrent layers" in said


@pytest.mark.parametrize("step", [1, 3])
def test_a_gradient_that_fp16_overflows_changes_nothing(run_parts, settings, step):
    """The gradient scaler leaves the optimizer's step out, and scales less from there on."""
    seen = []

    def scaled(parts):
        optimizer, accelerator = parts.optimizer, parts.runtime.accelerator
        scaler = accelerator.scaler = torch.amp.GradScaler("cpu")

        def overflow(gradient):
            gradient = gradient.clone()
            if parts.progress.step == step:
                gradient[0] = torch.inf
            return gradient

        def watch(take_step):
            weights = [p.detach().clone() for p in parts.policy.parameters()]
            rate, scale = optimizer.lr, scaler.get_scale()
            scaler.unscale_(optimizer)  # as accelerate does where the precision is fp16
            take_step()
            if parts.progress.step == step:
                assert all(map(torch.equal, weights, parts.policy.parameters()))
                assert optimizer.lr == rate
                assert scaler.get_scale() == scale / 2
                seen.append(step)

        next(parts.policy.parameters()).register_hook(overflow)
        return around_steps(parts, watch)

    assert run_parts(settings | {"STEPS": 4}, scaled) == 0 and seen == [step]
    rows = read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")
    assert ["update_kl" in row for row in rows] == [row["step"] != step for row in rows]
    final = AutoModelForCausalLM.from_pretrained(Path(settings["OUTPUT_DIR"]) / "final")
    assert all(parameter.isfinite().all() for parameter in final.parameters())


def test_an_evaluation_leaves_the_steps_samples_alone(main, settings, tmp_path, monkeypatch):
    (tmp_path / "noting.py").write_text(
        "def noting(completions, log_extra, log_metric, **_):\n"
        "    import numpy\n"
        "    log_extra('note', list(completions))\n"
        "    log_metric('size', numpy.float32(len(completions)))\n"
        "    return [0.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps([{"prompt": "One"}, {"prompt": "Two"}, {"prompt": "Three"}]))
    keys = {"REWARDS": [{"TYPE": "python", "FUNCTION": "noting:noting"}]}
    assert main(settings | keys | {"EVAL_FILE": str(held_out), "EVAL_EVERY": 2}) == 0
    rows = read_jsonl(Path(settings["OUTPUT_DIR"]) / "samples.jsonl")
    assert len(rows) == 24 and all(row["note"] == row["completion"] for row in rows)
    assert read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")[0]["size"] == 8


def test_prompts_that_lose_their_beginning_are_counted(main, settings, tmp_path, caplog):
    long = [{"prompt": "very " * n + "long"} for n in (3, 70, 90)]
    (tmp_path / "prompts.json").write_text(json.dumps(long))
    assert main(settings | {"STEPS": 1}) == 0
    assert (
        "2 of 3 prompts are longer than the 56 tokens that MAX_NEW_TOKENS leaves: they lose their "
        "beginnings"
    ) in caplog.text


def test_prompts_that_are_trained_and_evaluated_on_are_counted(main, settings, tmp_path, caplog):
    keys = settings | {"EVAL_EVERY": 1, "STEPS": 1, "EVAL_FILE": str(tmp_path / "eval.json")}
    Path(keys["EVAL_FILE"]).write_text(json.dumps([*PROMPTS[:2], {"prompt": "A new one"}]))
    assert main(keys) == 0
    assert caplog.messages == [
        "2 of 3 prompts of EVAL_FILE are also in TRAIN_FILE: what is evaluated on is trained on"
    ]
    caplog.clear()
    Path(keys["EVAL_FILE"]).write_text(json.dumps([{"prompt": "A new one"}]))
    assert main(keys | {"OUTPUT_DIR": str(tmp_path / "other")}) == 0
    assert caplog.messages == []


def test_each_start_says_what_it_was_made_with(main, settings, monkeypatch):
    import transformers

    import adaptiverl

    file = Path(settings["OUTPUT_DIR"], "environment.jsonl")
    assert main(settings | {"STEPS": 1}) == 0
    assert main(settings | {"STEPS": 2}, "RESUME=auto") == 0
    assert main(settings | {"STEPS": 2}, "RESUME=auto") == 0, "nothing is left to do"
    first, second = read_jsonl(file)
    assert first["command"][0] == "train.py" and second["command"][2:] == ["RESUME=auto"]
    assert datetime.fromisoformat(first["started"]) <= datetime.fromisoformat(second["started"])
    wanted = {
        "adaptiverl": adaptiverl.__version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "processes": 1,
        "threads": torch.get_num_threads(),
    }
    assert {name: first[name] for name in wanted} == wanted
    assert main(settings | {"STEPS": 1}) == 0
    assert len(read_jsonl(file)) == 1, "the earlier run's are put aside with it"


def test_training_raises_the_reward(main, settings):
    """A random model learns to write one word within forty steps; that it repeats it is right."""
    keys = {"STEPS": 40, "BATCH_SIZE": 16, "KL_COEF": 0, "SAMPLES_EVERY": 0}
    keys |= {"ON_COLLAPSE": "warn", "OPTIM": "adamw"}
    keys |= {"LRATE": 1e-2, "LR_RULE": "none"}  # a far way to go: no trust region
    only_regex = [{"TYPE": "regex", "PATTERNS": " the"}]
    assert main(settings | keys | {"REWARDS": only_regex}) == 0
    rewards = [row["reward"] for row in read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")]
    assert sum(rewards[:5]) / 5 < 0.3
    assert sum(rewards[-5:]) / 5 > 0.8


def test_after_a_run_signals_do_what_they_did_before(main, settings):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    assert main(settings | {"STEPS": 1}) == 0
    assert [signal.getsignal(number) for number in numbers] == before


def ended(child: Callable[[], int], number: int = 0) -> int:
    """How a forked process ends that does `child`, in ten seconds, and is sent signal `number`."""
    if (pid := os.fork()) == 0:
        signal.alarm(10)
        try:
            os._exit(child())
        finally:
            os._exit(1)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_in_a_forked_process_signals_are_not_the_runs():
    """SIGTERM ends it from its first moment on; the first Ctrl-C is for the run alone."""
    told, this = [], os.getpid()

    def interrupted(times: int) -> int:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        return len(told)

    with StopSignal(lambda: told.append(os.getpid() - this)) as stop:
        assert {ended(signal.pause, signal.SIGTERM) for _ in range(50)} == {-signal.SIGTERM}
        assert ended(lambda: interrupted(1)) == 0
        assert ended(lambda: interrupted(2)) == -signal.SIGINT
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set() and stop.number == 0
        os.kill(this, signal.SIGTERM)
        assert (told, stop.number) == ([0], signal.SIGTERM)


def test_an_earlier_run_is_set_aside_not_overwritten(main, settings, capfd):
    out = Path(settings["OUTPUT_DIR"])
    assert main(settings) == 0
    before = (out / "metrics.jsonl").read_text()
    assert main(settings | {"STEPS": 1}) == 0
    assert (out / "earlier-001" / "metrics.jsonl").read_text() == before
    assert len(read_jsonl(out / "metrics.jsonl")) == 1
    assert main(settings | {"STEPS": 1}) == 0
    assert sorted(p.name for p in out.glob("earlier-*")) == ["earlier-001", "earlier-002"]


def test_only_what_a_run_wrote_is_set_aside(main, settings):
    out = Path(settings["OUTPUT_DIR"])
    other = out / "other"
    assert main(settings | {"OUTPUT_DIR": str(other)}) == 0
    (out / "labels.sqlite").touch()
    (out / "notes.jsonl").touch()
    for _ in range(2):
        assert main(settings) == 0
    assert {p.name for p in out.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "controller.jsonl", "progress.jsonl",
        "environment.jsonl", "report.html", "final", "earlier-001", ".lock", "other",
        "labels.sqlite", "notes.jsonl",
    }  # fmt: skip
    (out / "earlier-001").rename(out / "earlier-007")
    assert main(settings) == 0
    assert (out / "earlier-008" / "final").is_dir(), "a number that was never used"
    assert main(settings | {"OUTPUT_DIR": str(other), "RESUME": "auto", "STEPS": 4}) == 0


def test_a_config_that_no_run_wrote_is_not_written_over(main, settings, tmp_path, capsys):
    """The user's own, in the folder that is to hold the run."""
    (tmp_path / "config.json").write_text("mine")
    assert main(settings | {"OUTPUT_DIR": str(tmp_path)}) == 2
    assert "has a config.json of its own: name another folder" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "mine"


def test_dry_run_shows_a_batch_and_trains_and_writes_nothing(main, settings, capsys):
    assert main(settings | {"REWARDS": [{"TYPE": "length", "TARGET": 8}]}, "--dry-run") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == ["prompt", "completion", "length", "reward"]
    assert [line.split()[-2:] for line in lines[1:9]] == [["1.000", "1.000"]] * 8
    assert "trainable parameters  158,592 of 158,592 (100.0%)" in out
    assert "peak memory" in out and "seconds per step" in out
    assert not Path(settings["OUTPUT_DIR"]).exists()


def test_dry_run_says_of_a_sum_that_is_too_large_that_it_is_missing(main, settings, capsys, caplog):
    rewards = [{"TYPE": "length", "TARGET": 8, "WEIGHT": 1e30}]
    assert main(settings | {"REWARDS": rewards}, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines[1:9]] == [["1.000", "missing"]] * 8
    assert caplog.messages == ["the weighted sum of 8 completions is beyond 1e16: left out"]


def test_the_console_shows_normalised_rewards_on_a_fixed_scale(main, settings, capsys):
    rewards = [{"TYPE": "regex", "PATTERNS": "th", "NORMALIZE": "zscore"}]
    assert main(settings | {"REWARDS": rewards, "LOG_EVERY": 2}) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Step ")]
    found = read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")
    one, two, three = (row["reward_fixed_scale"] for row in found)
    assert [line.split(" | ")[1] for line in lines] == [
        f"Reward (fixed scale): {value:.2f}" for value in (one, two, three)
    ]


def test_epochs_end_a_run_before_steps(main, settings):
    """Five prompts, two a step: two epochs are five steps."""
    assert main(settings | {"EPOCHS": 2, "STEPS": 50}) == 0
    assert len(read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")) == 5


def test_tensorboard_gets_the_metrics(main, settings):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    assert main(settings | {"TRACKERS": ["tensorboard"]}) == 0
    folder = Path(settings["OUTPUT_DIR"]) / "tensorboard" / "adaptiverl"
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    logged = [event.value for event in events.Scalars("reward")]
    rows = read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")
    assert logged == pytest.approx([row["reward"] for row in rows])


def test_a_tracker_that_fails_does_not_end_the_run(main, settings, monkeypatch, caplog):
    def log(self, values, step, **_):
        if step == 2:
            raise RuntimeError("the server is gone")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", log)
    assert main(settings | {"TRACKERS": ["tensorboard"], "STEPS": 3}) == 0
    out = Path(settings["OUTPUT_DIR"])
    said = "the tracker tensorboard failed and gets nothing more: the server is gone"
    assert caplog.text.count(said) == 1
    event = {"step": 2, "kind": "tracker", "message": said, "action": "warn"}
    assert event in read_jsonl(out / "events.jsonl")
    assert len(read_jsonl(out / "metrics.jsonl")) == 3


def test_a_tracker_that_cannot_start_is_told_in_a_line(main, settings, monkeypatch, capsys):
    def store_init_configuration(self, values):
        assert "$schema" not in values, "mlflow takes no such name"
        raise RuntimeError("no such server")

    monkeypatch.setattr(
        "accelerate.tracking.TensorBoardTracker.store_init_configuration", store_init_configuration
    )
    assert main(settings | {"TRACKERS": ["tensorboard"]}) == 2
    assert capsys.readouterr().err == "error: TRACKERS tensorboard: no such server\n"


def test_a_terminal_gets_a_progress_bar(settings, tmp_path, warm):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings | {"STEPS": 2}))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "train.py", str(config)]
    process = warm.start(command, ENVIRONMENT, output=theirs)
    os.close(theirs)
    screen = b""
    while True:
        try:
            read = os.read(ours, 4096)
        except OSError:  # Linux's end of file on a terminal whose program has ended
            break
        if not read:
            break
        screen += read
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert "2/2" in screen.decode() and "Step 1/2 | Reward:" in screen.decode()
