"""Adaptive control inside the program: trust region, its records, and what explains them."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import RANDOM_REWARD, around_steps, read_jsonl, with_samples, written_run

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.commands.explain import explain
from adaptiverl.config.schema import ConfigError
from adaptiverl.optim.trust_region import TrustRegion


def run_of(settings) -> tuple[list[dict], list[dict]]:
    out = Path(settings["OUTPUT_DIR"])
    return read_jsonl(out / "metrics.jsonl"), read_jsonl(out / "controller.jsonl")


def with_trust_region(parts, kind: type[TrustRegion]):
    """`parts` whose optimizer has a trust region of `kind`."""
    old = parts.optimizer.trust_region
    new = kind(parts.optimizer.base, kl=old.kl, steps=old.steps)
    parts.optimizer.trust_region = new
    return parts


@pytest.mark.parametrize("rate", [1e-7, 1e-3, 1.0, "auto"])
@pytest.mark.parametrize("optim", ["adam_mini", "adamw", "sgd", "rmsprop"])
def test_no_update_goes_further_than_twice_the_target_whatever_the_rate(
    main, settings, rate, optim
):
    assert main(settings | {"STEPS": 5, "LRATE": rate, "OPTIM": optim}) == 0
    metrics, reasons = run_of(settings)
    for row in metrics:
        assert 0 < row["update_kl"] <= 2 * row["update_kl_target"]
        left = (5 - row["step"] + 1) / 5
        assert row["update_kl_target"] == pytest.approx(4 * 0.004 * left), "no evidence yet"
    assert metrics[0]["update_kl"] >= metrics[0]["update_kl_target"] / 2, (
        "the first is searched for"
    )
    if rate == 1.0 and optim == "adamw":
        assert metrics[0]["lr"] < 1e-2 and metrics[0]["updates_scaled"] == 1
        first = reasons[0]
        assert (first["rule"], first["signal"], first["old"]) == ("line_search", "kl", 1.0)
        assert first["new"] == pytest.approx(metrics[0]["lr"])


@pytest.mark.parametrize("optim", ["sgd", "rmsprop"])
def test_where_there_can_be_no_evidence_the_target_is_the_one_given(main, settings, optim):
    keys = {"OPTIM": optim, "MOMENTUM": 0, "LRATE": "auto", "TRUST_REGION_KL": 0.003}
    assert main(settings | keys) == 0
    targets = [row["update_kl_target"] for row in run_of(settings)[0]]
    assert targets == pytest.approx([0.003, 0.002, 0.001])


def test_no_gradient_moves_no_rate(main, settings):
    """Every completion gets the same reward."""
    keys = {"REWARDS": [{"TYPE": "regex", "PATTERNS": "^$", "NEGATE": True}], "KL_COEF": 0}
    assert main(settings | keys) == 0
    metrics, reasons = run_of(settings)
    assert [row["lr"] for row in metrics] == [1e-3] * 3 and not reasons
    assert [row["grad_norm"] for row in metrics] == [0] * 3


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("frozen", [None, "bf16", "LOAD_4BIT", "LOAD_8BIT"])
def test_rounding_is_not_taken_for_an_update(run_parts, settings, frozen, scale):
    """In bf16 a policy is 1e-6 to 1e-4 nats per token away from itself, more the more weights have
    moved; so the KL of an update is measured in fp32, with the frozen weights as they are rounded.

    Activations in 8 bits are always rounded: there the target is raised to what that makes.
    """
    seen, now = [], {}

    def exact(policy, rollout):
        """By a copy of the policy that is fp32 altogether."""
        policy = copy.deepcopy(policy).float()
        for module in policy.modules():
            if type(module).__name__ == "Linear4bit":
                module.compute_dtype = torch.float32
        return policy.distributions(rollout)

    class Shrinking(TrustRegion):
        def line_search(self, measure_kl, rescale, target, max_scale=math.inf):
            rescale(scale)
            log_ratio = exact(now["policy"], now["probe"]) - now["before"]
            k3 = now["before"].exp() * (log_ratio.exp() - 1 - log_ratio)
            kl = k3.sum() / now["probe"].completion_mask.sum()
            seen.append((measure_kl(), kl.item(), target))
            return 1.0, target

    def watched(parts):
        def note(rollout):
            now["policy"] = parts.sampler.policy
            now["probe"] = rollout.select(torch.arange(0, len(rollout), 8))
            now["before"] = exact(now["policy"], now["probe"])

        return with_trust_region(with_samples(parts, note), Shrinking)

    keys = {"BF16": True, "FULLTUNE": not frozen, "LRATE": 1e-4, "STEPS": 2, "BATCH_SIZE": 32}
    keys |= {frozen: True} if frozen in ("LOAD_4BIT", "LOAD_8BIT") else {}
    keys |= {"TRUST_REGION_KL": 1e-6, "MAX_NEW_TOKENS": 7}  # few: the KL over the vocabulary
    assert run_parts(settings | keys, watched) == 0 and len(seen) == 2
    for kl, want, target in seen:
        if frozen == "LOAD_8BIT":
            assert target > 1e-6
        else:
            assert kl == pytest.approx(want, rel=0.05, abs=1e-8) and target <= 1e-6


def test_an_update_that_was_taken_back_does_not_raise_the_rate(run_parts, settings):
    class TakingBack(TrustRegion):
        def line_search(self, measure_kl, rescale, target, max_scale=math.inf):
            rescale(0.0)
            return 0.1, 0.0

    assert run_parts(settings, lambda parts: with_trust_region(parts, TakingBack)) == 0
    assert [row["lr"] for row in run_of(settings)[0]] == pytest.approx([1e-4, 1e-5, 1e-6])


def test_an_update_whose_kl_was_never_finite_is_logged_as_left_out(run_parts, settings):
    class Lost(TrustRegion):
        def line_search(self, measure_kl, rescale, target, max_scale=math.inf):
            return super().line_search(lambda: math.nan, rescale, target, max_scale)

    assert run_parts(settings, lambda parts: with_trust_region(parts, Lost)) == 0
    rows = run_of(settings)[0]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 5e-4, 2.5e-4])
    assert {(row["update_kl"], row["update_scale"]) for row in rows} == {(None, 0.0)}
    assert [row["updates_scaled"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("least", [None, 1e-3])
def test_each_steps_rate_follows_from_the_reasons_given(main, settings, least):
    """Also where the line search brings it below MIN_LR, and the next step begins there again."""
    keys = {"STEPS": 8, "LRATE": 1e-3, "LR_RULE": "trust_region+cyclical", "REWARD_RULE": "scaling"}
    assert main(settings | keys | {"MIN_LR": least}) == 0
    metrics, reasons = run_of(settings)
    rate = 1e-3
    for row in metrics:
        for reason in (
            r for r in reasons if r["hyperparameter"] == "lr" and r["step"] == row["step"]
        ):
            assert reason["old"] == pytest.approx(rate, rel=1e-6), "no change without a reason"
            rate = reason["new"]
            if reason["rule"] == "line_search":
                assert rate == pytest.approx(row["lr"], rel=1e-6)
        searched = [r for r in reasons if r["rule"] == "line_search" and r["step"] == row["step"]]
        assert (row["update_scale"] != 1) == bool(searched)
    rules = {r["rule"] for r in reasons}
    assert rules >= {"trust_region", "min_lr" if least else "cyclical"}


def test_gradient_accumulation_changes_nothing(main, settings):
    runs = []
    for pieces in (1, 4):
        assert main(settings | {"GRAD_ACCUM": pieces, "OPTIM": "sgd", "LRATE": 0.1}) == 0
        runs.append(run_of(settings)[0])
    for one, other in zip(*runs, strict=True):
        assert one["update_kl"] == pytest.approx(other["update_kl"], rel=1e-2)
        assert one["lr"] == pytest.approx(other["lr"], rel=1e-2)


def test_without_rules_the_rate_is_the_one_that_was_typed(main, settings):
    assert main(settings | {"LR_RULE": "none", "LRATE": 1e-3}) == 0
    metrics, reasons = run_of(settings)
    assert {row["lr"] for row in metrics} == {1e-3}
    assert not reasons and not any("update_kl" in row for row in metrics)


@pytest.mark.parametrize(
    ("batch", "length", "rows", "few"),
    [
        (4, 32, range(0, 4, 2), False),  # two at least: k3 of the sampled tokens
        (8, 32, range(0, 8, 4), False),
        (64, 8, range(0, 64, 8), False),  # one in eight of many
        (8, 2, range(0, 8, 4), True),  # of few tokens the KL over the vocabulary
        (16, 15, range(0, 16, 8), True),
        (8, 50, range(0, 8, 4), True),  # they may be few because completions end early
    ],
)
def test_a_kl_of_the_update_is_that_of_the_two_policies(
    run_parts, settings, tmp_path, monkeypatch, batch, length, rows, few
):
    """By the model's own passes before and after the step; rewards differ whatever is sampled."""
    (tmp_path / "noise_of_control.py").write_text(RANDOM_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    settings["REWARDS"] = [{"TYPE": "python", "FUNCTION": "noise_of_control:noise"}]
    seen, sampled = [], []
    rows = torch.tensor([*rows])

    def note(rollout):
        """After it has ended every completion after a token, where they may have 50."""
        if length == 50:
            rollout.completion_mask[:, 1:], rollout.logprobs[:, 1:] = 0, 0
        sampled.append(rollout)

    def table(policy, part) -> torch.Tensor:
        ids = torch.cat([part.prompt_ids[part.prompt_of], part.completion_ids], 1)
        mask = torch.cat([part.prompt_mask[part.prompt_of], part.completion_mask], 1)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = policy.lm(input_ids=ids, attention_mask=mask, position_ids=places).logits
        words = logits[:, part.prompt_ids.shape[1] - 1 : -1].log_softmax(-1)
        return words if few else words.gather(-1, part.completion_ids[..., None])

    def watched(parts):
        @torch.no_grad()
        def watch(take_step):
            part = sampled[-1].select(rows)
            before = table(parts.policy, part)
            take_step()
            log_ratio = table(parts.policy, part) - before
            kl = log_ratio.exp() - 1 - log_ratio
            kl = (kl * before.exp() if few else kl).sum(-1)
            mask = part.completion_mask
            seen.append((kl * mask).sum().item() / mask.sum().item())

        return around_steps(with_samples(parts, note), watch)

    keys = {"BATCH_SIZE": batch, "MAX_NEW_TOKENS": length, "LRATE": 0.1, "STEPS": 2}
    assert run_parts(settings | keys, watched) == 0
    recorded = [row["update_kl"] for row in run_of(settings)[0]]
    assert recorded == pytest.approx(seen, rel=1e-2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"LR_RULE": "trnd"}, "LR_RULE: there is no rule 'trnd'; the nearest is 'trend'"),
        ({"REWARD_RULE": "loss_decay"}, "REWARD_RULE: there is no rule 'loss_decay'"),
        ({"LRATE": "auto", "LR_RULE": "trend"}, 'LRATE "auto" needs LR_RULE trust_region'),
        ({"LR_RULE": "none", "LRATE": 1, "TRUST_REGION_KL": 0.1}, "TRUST_REGION_KL needs LR_RULE"),
        (
            {"MOMENTUM_RULE": "inverse"},
            "MOMENTUM_RULE has no effect: OPTIM adam_mini has no momentum",
        ),
        ({"BETAS_RULE": "variance", "OPTIM": "sgd"}, "BETAS_RULE has no effect: OPTIM sgd has"),
        (
            {"BETAS_RULE": "variance", "STEPS": 100, "TRUST_REGION_SCHEDULE": "constant"},
            "BETAS_RULE variance moves nothing in the first 4,603 steps: Adam's bias correction "
            "takes beta2 as constant while beta2^t is above 0.01, and the run has 100",
        ),
        ({"ALPHA_RULE": "stable"}, "ALPHA_RULE has no effect: OPTIM adam_mini has no alpha"),
        ({"WD_RULE": "trend"}, "WD_RULE has no effect: WEIGHT_DECAY is 0"),
        ({"LRATE": 1e-3, "MAX_LR": 1e-4}, "LRATE 0.001 is above MAX_LR, which is 0.0001"),
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
    searches = [reason for reason in reasons if reason["rule"] == "line_search"]
    factor = math.prod(reason["new"] / reason["old"] for reason in searches)
    steps = ", ".join(str(reason["step"]) for reason in searches[:5])
    when = f"{len(searches)} steps ({steps}" if len(searches) > 1 else f"step {steps}: "
    assert f"line_search     × {factor:.3g} in {when}" in text
    assert f"step 1      × {searches[0]['new']:.3g}" in text, "from 1"
    assert f"with curves: adaptiverl report {out}" in text


def test_explain_names_the_steps_that_had_a_value(main, settings):
    """A schedule moves after a step, for the next; after the last step, for none."""
    keys = {"LR_RULE": [{"name": "cosine", "cycle_length": 4}], "REWARD_RULE": "trend"}
    assert main(settings | keys | {"STEPS": 4, "OPTIM": "adamw"}) == 0
    metrics, reasons = run_of(settings)
    assert [row["step"] for row in reasons if row["rule"] == "cosine"] == [1, 2, 3, 4]
    rates = [row["lr"] for row in metrics]
    text = explain(Path(settings["OUTPUT_DIR"]))
    assert f"cosine          × {rates[3] / rates[0]:.3g} in 3 steps (2, 3, 4)" in text
    for step in (2, 3, 4):
        factor = rates[step - 1] / rates[step - 2]
        assert f"step {step}      × {factor:<8.3g} cosine, time {step - 1}" in text
    assert f"highest {rates[0]:.3g} (step 1)" in text


def explained(folder: Path, rows: list[dict], changes: Sequence[dict] = ()) -> str:
    rows = [{"lr": 1e-3} | row for row in rows]
    return explain(written_run(folder, rows, {"STEPS": len(rows)}, controller=list(changes)))


def test_explain_names_the_steps_of_first_and_last_values(tmp_path):
    """An evaluation is not of each step."""
    rows = [{"step": k, "reward": k / 10, "eval/reward": None} for k in range(1, 13)]
    for row in rows[1::2]:
        row["eval/reward"] = row["step"] / 100
    text = explained(tmp_path / "few", rows)
    assert "\nreward       0.25 in steps 1 to 4, 1.05 in steps 9 to 12 (± 0.091)\n" in text
    assert "\neval/reward  0.02 in step 2, 0.12 in step 12\n" in text
    more = [row | {"step": k, "eval/reward": 1 if k % 2 else None}
            for k, row in enumerate(rows * 2, 1)]  # fmt: skip
    text = explained(tmp_path / "more", more)
    assert "\neval/reward  1 in 4 steps from 1 to 7, 1 in 4 steps from 17 to 23 (± 0)\n" in text
    assert text.count("± is one standard error of the difference") == 1
    text = explained(tmp_path / "one", rows[:1])
    assert "\nshort        1 step; from 30 on, means say more\nreward       0.1 in step 1\n" in text


def test_explain_says_once_what_an_error_is_where_the_verdict_has_none(tmp_path):
    rows = [{"step": k, "reward": None, "kl": k / 10} for k in range(1, 13)]
    text = explained(tmp_path / "run", rows)
    assert "\n±            one standard error of the difference\n" in text
    assert text.count("standard error of the difference") == 1


def test_explain_takes_a_label_that_is_no_rule_of_this_version(tmp_path):
    changes = [
        {"step": 2, "hyperparameter": "lr", "rule": rule, "signal": "reward", "value": 0.5,
         "old": 1e-3, "new": 2e-3}
        for rule in ("reward trend", "back to its base")
    ]  # fmt: skip
    rows = [{"step": k, "reward": 0.5} for k in (1, 2, 3)]
    text = explained(tmp_path / "run", rows, changes)
    assert "\n  reward trend    × 2 in step 2: the reward " in text
    assert "\n  back to its base × 2 in step 2\n" in text


def test_explain_names_the_first_of_equal_rates(main, settings):
    assert main(settings | {"LR_RULE": "none", "LRATE": 1e-3}) == 0
    text = explain(Path(settings["OUTPUT_DIR"]))
    assert "lowest 0.001 (step 1), highest 0.001 (step 1)" in text


def test_explain_of_a_run_that_nothing_moved_and_of_no_run(main, settings, tmp_path, capsys):
    assert main(settings | {"LR_RULE": "none", "LRATE": 1e-3}) == 0
    assert "nothing moved the rate" in explain(Path(settings["OUTPUT_DIR"]))
    assert adaptiverl(["explain", str(tmp_path / "none")]) == 2
    assert "is not a folder: name the OUTPUT_DIR" in capsys.readouterr().err
    with (Path(settings["OUTPUT_DIR"]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # still being written
    assert "steps 1 to 3" in explain(Path(settings["OUTPUT_DIR"]))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has no step yet"):
        explain(tmp_path)


def test_a_missing_reward_is_no_number_in_the_report(tmp_path):
    rows = [{"step": k, "reward": None, "lr": 1e-3} for k in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "controller.jsonl").write_text("")
    assert "reward       missing in all steps" in explain(tmp_path)
