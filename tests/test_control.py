"""Adaptive control inside the program: trust region, its records, and what explains them."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.run.config import UserError
from adaptiverl.run.explain import explain


def run_of(settings) -> tuple[list[dict], list[dict]]:
    out = Path(settings["OUTPUT_DIR"])
    return read_jsonl(out / "metrics.jsonl"), read_jsonl(out / "controller.jsonl")


@pytest.mark.parametrize("rate", [1e-7, 1e-3, 1.0, "auto"])
@pytest.mark.parametrize("optim", ["adamw", "sgd", "rmsprop"])
def test_no_update_goes_further_than_twice_the_target_whatever_the_rate(
    main, settings, rate, optim
):
    assert main(settings | {"STEPS": 5, "LRATE": rate, "OPTIM": optim}) == 0
    metrics, reasons = run_of(settings)
    for row in metrics:
        assert 0 < row["kl_step"] <= 2 * row["kl_step_target"]
        left = (5 - row["step"] + 1) / 5
        assert row["kl_step_target"] == pytest.approx(0.004 * left * 0.1), "no evidence yet"
    assert metrics[0]["kl_step"] >= metrics[0]["kl_step_target"] / 2, "the first is searched for"
    if rate == 1.0 and optim == "adamw":
        assert metrics[0]["lr"] < 1e-2 and metrics[0]["braked"] == 1
        first = reasons[0]
        assert (first["rule"], first["signal"], first["old"]) == ("brake", "kl", 1.0)
        assert first["new"] == pytest.approx(metrics[0]["lr"])


@pytest.mark.parametrize("optim", ["sgd", "rmsprop"])
def test_where_there_can_be_no_evidence_the_target_is_the_one_given(main, settings, optim):
    assert main(settings | {"OPTIM": optim, "MOMENTUM": 0, "LRATE": "auto"}) == 0
    targets = [row["kl_step_target"] for row in run_of(settings)[0]]
    assert targets == pytest.approx([0.004, 0.004 * 2 / 3, 0.004 / 3])


def test_no_gradient_moves_no_rate(main, settings):
    """Every completion gets the same reward."""
    keys = {"REWARDS": [{"TYPE": "regex", "PATTERNS": "^$", "NEGATE": True}], "KL_COEF": 0}
    assert main(settings | keys) == 0
    metrics, reasons = run_of(settings)
    assert [row["lr"] for row in metrics] == [1e-3] * 3 and not reasons
    assert [row["grad_norm"] for row in metrics] == [0] * 3


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("frozen", [None, "bf16", "LOAD_4BIT", "LOAD_8BIT"])
def test_rounding_is_not_taken_for_an_update(main, settings, monkeypatch, frozen, scale):
    """In bf16 a policy is 1e-6 to 1e-4 nats per token away from itself, more the more weights have
    moved; so the KL of an update is measured in fp32, with the frozen weights as they are rounded.

    Activations in 8 bits are always rounded: there the target is raised to what that makes.
    """
    from adaptiverl.optim.trust_region import TrustRegion
    from adaptiverl.program import Run

    seen, now, step = [], {}, Run.step

    def exact(run, rollout):
        """By a copy of the policy that is fp32 altogether."""
        policy = copy.deepcopy(run.sampler.policy).float()
        for module in policy.modules():
            if type(module).__name__ == "Linear4bit":
                module.compute_dtype = torch.float32
        return policy.distributions(rollout)

    def spy(run, rollout, grad_norm):
        now["run"], now["probe"] = run, rollout.part(torch.arange(0, len(rollout), 8))
        now["before"] = exact(run, now["probe"])
        return step(run, rollout, grad_norm)

    def shrink(region, measure, rescale, target, most):
        rescale(scale)
        log_ratio = exact(now["run"], now["probe"]) - now["before"]
        k3 = now["before"].exp() * (log_ratio.exp() - 1 - log_ratio)
        kl = k3.sum() / now["probe"].completion_mask.sum()
        seen.append((measure(), kl.item(), target))
        return 1.0, target

    monkeypatch.setattr(Run, "step", spy)
    monkeypatch.setattr(TrustRegion, "fit", shrink)
    keys = {"BF16": True, "FULLTUNE": not frozen, "LRATE": 1e-4, "STEPS": 2, "BATCH_SIZE": 32}
    keys |= {frozen: True} if frozen in ("LOAD_4BIT", "LOAD_8BIT") else {}
    assert main(settings | keys | {"KL_STEP_TARGET": 1e-6}) == 0 and len(seen) == 2
    for kl, want, target in seen:
        if frozen == "LOAD_8BIT":
            assert target > 1e-6
        else:
            assert kl == pytest.approx(want, rel=0.05, abs=1e-8) and target <= 1e-6


def test_an_update_that_was_taken_back_does_not_raise_the_rate(main, settings, monkeypatch):
    from adaptiverl.optim.trust_region import TrustRegion

    def take_back(region, measure, rescale, target, most):
        rescale(0.0)
        return 0.1, 0.0

    monkeypatch.setattr(TrustRegion, "fit", take_back)
    assert main(settings) == 0
    assert [row["lr"] for row in run_of(settings)[0]] == pytest.approx([1e-4, 1e-5, 1e-6])


def test_each_steps_rate_follows_from_the_reasons_given(main, settings):
    keys = {"STEPS": 8, "LRATE": 1e-3, "LR_RULE": "kl_target+cyclical", "REWARD_RULE": "scaling"}
    assert main(settings | keys) == 0
    metrics, reasons = run_of(settings)
    rate = 1e-3
    for row in metrics:
        for reason in (r for r in reasons if r["what"] == "lr" and r["step"] == row["step"]):
            assert reason["old"] == pytest.approx(rate, rel=1e-6), "no change without a reason"
            rate = reason["new"]
            if reason["rule"] in ("brake", "search"):
                assert rate == pytest.approx(row["lr"], rel=1e-6)
    assert {r["rule"] for r in reasons} >= {"kl_target", "cyclical"}


def test_gradient_accumulation_changes_nothing(main, settings):
    runs = []
    for pieces in (1, 4):
        assert main(settings | {"GRAD_ACCUM": pieces, "OPTIM": "sgd", "LRATE": 0.1}) == 0
        runs.append(run_of(settings)[0])
    for one, other in zip(*runs, strict=True):
        assert one["kl_step"] == pytest.approx(other["kl_step"], rel=1e-2)
        assert one["lr"] == pytest.approx(other["lr"], rel=1e-2)


def test_without_rules_the_rate_is_the_one_that_was_typed(main, settings):
    assert main(settings | {"LR_RULE": "none", "LRATE": 1e-3}) == 0
    metrics, reasons = run_of(settings)
    assert {row["lr"] for row in metrics} == {1e-3}
    assert not reasons and not any("kl_step" in row for row in metrics)


@pytest.mark.parametrize(
    ("batch", "length", "rows", "few"),
    [
        (4, 32, range(4), False),  # all where there are few: k3 of the sampled tokens
        (8, 32, range(0, 8, 2), False),  # four at least
        (64, 8, range(0, 64, 8), False),  # one in eight of many
        (8, 2, range(0, 8, 2), True),  # of few tokens the KL over the vocabulary
        (16, 15, range(0, 16, 4), True),
        (8, 50, range(0, 8, 2), True),  # they may be few because completions end early
    ],
)
def test_a_kl_of_the_update_is_that_of_the_two_policies(
    main, settings, monkeypatch, batch, length, rows, few
):
    """By the model's own passes before and after the step."""
    from adaptiverl.program import Run

    step, sample, seen = Run.step, Run.sample, []
    rows = torch.tensor([*rows])

    def ending_early(run, batch, step):
        """After a token, where they may have 50."""
        rollout = sample(run, batch, step)
        if length == 50:
            rollout.completion_mask[:, 1:], rollout.logprobs[:, 1:] = 0, 0
        return rollout

    def table(run, part) -> torch.Tensor:
        ids = torch.cat([part.prompt_ids[part.prompt_of], part.completion_ids], 1)
        mask = torch.cat([part.prompt_mask[part.prompt_of], part.completion_mask], 1)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = run.policy.lm(input_ids=ids, attention_mask=mask, position_ids=places).logits
        words = logits[:, part.prompt_ids.shape[1] - 1 : -1].log_softmax(-1)
        return words if few else words.gather(-1, part.completion_ids[..., None])

    @torch.no_grad()
    def spy(run, rollout, grad_norm):
        part = rollout.part(rows)
        before = table(run, part)
        taken = step(run, rollout, grad_norm)
        log_ratio = table(run, part) - before
        kl = log_ratio.exp() - 1 - log_ratio
        kl = (kl * before.exp() if few else kl).sum(-1)
        mask = part.completion_mask
        seen.append((kl * mask).sum().item() / mask.sum().item())
        return taken

    monkeypatch.setattr(Run, "step", spy)
    monkeypatch.setattr(Run, "sample", ending_early)
    keys = {"BATCH_SIZE": batch, "MAX_NEW_TOKENS": length, "LRATE": 0.1, "STEPS": 2}
    assert main(settings | keys) == 0
    recorded = [row["kl_step"] for row in run_of(settings)[0]]
    assert recorded == pytest.approx(seen, rel=1e-2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"LR_RULE": "trnd"}, "lr_rule: 'trnd' is not one of loss_decay, trend, patience"),
        ({"REWARD_RULE": "loss_decay"}, "reward_rule: 'loss_decay' is not one of"),
        ({"LRATE": "auto", "LR_RULE": "trend"}, 'LRATE "auto" needs LR_RULE kl_target'),
        ({"LR_RULE": "none", "LRATE": 1, "KL_STEP_TARGET": 0.1}, "KL_STEP_TARGET needs LR_RULE"),
        ({"MOMENTUM_RULE": "inverse"}, "MOMENTUM_RULE moves nothing that OPTIM adamw has"),
        ({"BETAS_RULE": "variance", "OPTIM": "sgd"}, "BETAS_RULE moves nothing that OPTIM sgd"),
        (
            {"BETAS_RULE": "variance", "STEPS": 100, "KL_STEP_FALLS": False},
            "betas_rule variance moves nothing in the first 4,603 steps: Adam's bias correction "
            "takes beta2 as constant while beta2^t is above 0.01, and the run has 100",
        ),
        ({"ALPHA_RULE": "stable"}, "ALPHA_RULE moves nothing"),
        ({"WD_RULE": "trend"}, "WD_RULE moves nothing"),
        ({"LRATE": 1e-3, "MAX_LR": 1e-4}, "the rate 0.001 is outside its bounds, 1e-09 … 0.0001"),
    ],
)
def test_contradictions_are_told_before_the_model_loads(main, settings, capsys, keys, message):
    broken = settings | {"MODEL": settings["MODEL"]} | keys
    assert main(broken) == 2
    assert message in capsys.readouterr().err


def test_explain_says_what_moved_the_rate(main, settings, capsys):
    assert main(settings | {"STEPS": 12, "LRATE": 1.0}) == 0
    capsys.readouterr()
    out = Path(settings["OUTPUT_DIR"])
    assert adaptiverl(["explain", str(out)]) == 0
    text = capsys.readouterr().out
    metrics, reasons = run_of(settings)
    assert f"{out}: steps 1 to 12" in text
    assert f"rate         {metrics[0]['lr']:.3g} at first, {metrics[-1]['lr']:.3g} at last" in text
    brakes = [reason for reason in reasons if reason["rule"] == "brake"]
    factor = math.prod(reason["new"] / reason["old"] for reason in brakes)
    steps = ", ".join(str(reason["step"]) for reason in brakes[:5])
    assert f"brake           × {factor:.3g} in {len(brakes)} steps ({steps}" in text
    assert f"step 1      1 → {brakes[0]['new']:.3g}" in text
    assert (out / "lr_vs_reward.png").read_bytes()[1:4] == b"PNG"


def test_explain_of_a_run_that_nothing_moved_and_of_no_run(main, settings, tmp_path, capsys):
    assert main(settings | {"LR_RULE": "none", "LRATE": 1e-3}) == 0
    assert "nothing moved the rate" in explain(Path(settings["OUTPUT_DIR"]))
    assert adaptiverl(["explain", str(tmp_path / "none")]) == 2
    assert "does not exist: name the folder" in capsys.readouterr().err
    with (Path(settings["OUTPUT_DIR"]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # still being written
    assert "steps 1 to 3" in explain(Path(settings["OUTPUT_DIR"]))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no step yet"):
        explain(tmp_path)


def test_a_missing_reward_is_no_number_in_the_report(tmp_path):
    rows = [{"step": k, "reward": None, "lr": 1e-3} for k in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "controller.jsonl").write_text("")
    assert "reward       missing in the first ten steps" in explain(tmp_path)
