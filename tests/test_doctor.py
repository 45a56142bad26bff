"""The doctor: real runs with a fault, and figures on both sides of each line that it draws.

All 26 faults and 20 sound runs are in benchmarks/doctor.py.
"""

import json
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl, written_run

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.commands.curves import Run, change, read_run
from adaptiverl.commands.doctor import ORDER, findings
from adaptiverl.commands.verdict import verdict
from benchmarks.doctor import FAULTS, MINE, SOUND

SHORT = {"STEPS": 8, "MAX_NEW_TOKENS": 8, "ON_COLLAPSE": "warn"}


def kinds(folder: str | Path) -> list[str]:
    return [each.kind for each in findings(read_run(Path(folder)))]


# Real runs, of a model that never ends a text: what comes first is the cause


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("rate 1 without trust region", {"LRATE": 50}),
        ("rate of 0", {}),
        ("constant reward", {}),
        ("NaN for three of four", {}),
        ("two rewards in conflict", {}),
        ("one prompt, again and again", {}),
    ],
)
def test_the_cause_is_named_first(main, settings, name, keys):
    fault = FAULTS[name]
    Path(settings["TRAIN_FILE"]).write_text(json.dumps([{"prompt": p} for p in fault.prompts]))
    rewards = fault.keys["REWARDS"]
    if rewards[0]["TYPE"] == "classifier":  # it takes a second to load
        rewards = settings["REWARDS"][:1]
    del settings["LRATE"]
    assert main(settings | SHORT | fault.keys | {"REWARDS": rewards} | keys) == 0
    assert kinds(settings["OUTPUT_DIR"])[0] == fault.expected


@pytest.mark.parametrize("name", ["gradient of 0", "gradient NaN in each fourth step"])
def test_a_gradient_that_is_nothing_is_named(run_parts, settings, name):
    gradient = FAULTS[name].gradient

    def broken(parts):
        for weight in parts.policy.parameters():
            weight.register_hook(lambda g: gradient(g, parts.progress.step))
        return replace(parts)

    assert run_parts(settings | SHORT, broken) == 0
    assert kinds(settings["OUTPUT_DIR"])[0] == FAULTS[name].expected


def test_prompts_that_are_cut_are_named(main, settings):
    assert main(settings | SHORT | {"MAXSEQ": 14}) == 0
    (event,) = read_jsonl(Path(settings["OUTPUT_DIR"]) / "events.jsonl")
    assert event["kind"] == "prompts cut" and event["step"] == 0
    assert event["message"].startswith("1 of 5 prompts are longer than the 6 tokens")
    assert "prompts cut" in kinds(settings["OUTPUT_DIR"])


def test_a_killed_run_is_told_from_one_that_runs(start, settings):
    process = start(settings | {"STEPS": 100_000, "SAMPLES_EVERY": 0})
    out = Path(settings["OUTPUT_DIR"])
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
    assert read_run(out).state == "running" and "killed" not in kinds(out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_run(out).state == "killed" and kinds(out)[0] == "killed"


def test_a_run_of_the_shipped_kind_is_sound(main, settings, capsys):
    keys = {"MODEL": str(ROOT / "benchmarks/policy-small"), "MAX_NEW_TOKENS": 32, "STEPS": 6}
    rewards = {"REWARDS": [{"TYPE": "python", "FUNCTION": MINE + "varied"}]}
    assert main(settings | keys | rewards) == 0
    capsys.readouterr()
    assert adaptiverl(["doctor", settings["OUTPUT_DIR"]]) == 0
    assert "6 steps of 6, finished" in (said := capsys.readouterr().out)
    assert "nothing is wrong" in said


# Figures by hand


STEPS = 40
REWARDS = [
    {"TYPE": "length", "NAME": "a", "WEIGHT": 1.0},
    {"TYPE": "regex", "NAME": "b", "WEIGHT": 1.0},
]
KEYS = {
    "STEPS": STEPS, "LR_RULE": "trust_region", "NUM_GENERATIONS": 4, "BATCH_SIZE": 16,
    "MAX_NEW_TOKENS": 32, "TEMPERATURE": 1.0, "KL_COEF": 0.05, "REWARDS": REWARDS[:1],
}  # fmt: skip


def noise(k: int) -> float:
    return random.Random(k).gauss(0, 0.02)


def metrics(**more) -> list[dict]:
    """Of a sound run; `more` are values, or functions of the step's share of the run."""
    rows = []
    for k in range(1, STEPS + 1):
        row = {
            "step": k, "reward": 0.5 + 0.3 * k / STEPS + noise(k), "reward_std": 0.2,
            "frac_reward_zero_std": 0.05, "entropy": 3.0 - 0.5 * k / STEPS, "kl": 0.1 * k / STEPS,
            "kl_per_completion": 3.0 * k / STEPS, "kl_coef": 0.05, "grad_norm": 2.0, "lr": 1e-4,
            "skipped": 0, "completions/mean_length": 25.0, "rewards/a/mean": 0.5,
        }  # fmt: skip
        for name, value in more.items():
            row[name] = value(k / STEPS) if callable(value) else value
        rows.append(row)
    return rows


def a_run(folder: Path, config: dict | None = None, samples: list[dict] | None = None, **more):
    rows = metrics(**more)
    return written_run(folder / "run", rows, KEYS | (config or {}), samples=samples or texts())


def texts(length: int = 20, **columns) -> list[dict]:
    """Completions of `length` tokens, and rewards by functions of their number in their prompt."""
    return [
        {
            "step": step, "prompt": f"p{k // 4}", "completion": "x", "reward": 0.5,
            "completion_ids": [7] * length,
        }
        | {f"rewards/{name}": value(k % 4) for name, value in columns.items()}
        for step in range(1, STEPS + 1)
        for k in range(16)
    ]  # fmt: skip


STILL = {"reward": lambda s: 0.5 + noise(round(1000 * s))}
TWO = {"REWARDS": REWARDS}


@pytest.mark.parametrize(
    ("expected", "config", "samples", "figures"),
    [
        ([], {}, None, {}),
        (["entropy collapse"], {}, None, {"entropy": lambda s: 3.0 * (1 - s) + 0.01}),
        ([], {}, None, {"entropy": lambda s: 3.0 * (1 - 0.7 * s)}),
        (
            ["rate too large"],
            {"LR_RULE": "none"},
            None,
            {"entropy": lambda s: 0.01 if s > 0.1 else 3.0, "frac_reward_zero_std": 1.0},
        ),
        (["KL explodes"], {}, None, {"kl": 2.0, "kl_per_completion": 60.0}),
        ([], {}, None, {"kl": 2.0, "kl_per_completion": 6.0}),  # short texts
        (
            ["rate too small"],
            {"LR_RULE": "none"},
            None,
            STILL | {"kl": 1e-6, "kl_per_completion": 1e-5},
        ),
        ([], {"LR_RULE": "none"}, None, STILL | {"kl": 1e-3, "kl_per_completion": 0.03}),
        (
            ["KL_COEF too large"],
            {"KL_COEF": 50},
            None,
            STILL | {"kl_coef": 50.0, "kl": 1e-4, "kl_per_completion": 1e-3},
        ),
        (["temperature"], {"TEMPERATURE": 0.1}, None, {"entropy": 0.1}),
        ([], {"TEMPERATURE": 0.7}, None, {"entropy": lambda s: 1.5 - 0.2 * s}),
        (["batch too small"], {"NUM_GENERATIONS": 1, "BATCH_SIZE": 2}, None, STILL),
        ([], {"NUM_GENERATIONS": 1, "BATCH_SIZE": 2}, None, {}),  # it learns all the same
        (["hacked"], {}, None, {"held_out/rewards/c/mean": lambda s: 0.9 - 0.5 * s + noise(7)}),
        ([], {}, None, {"held_out/rewards/c/mean": lambda s: 0.9 - 0.05 * s}),  # by a twentieth
        ([], {}, None, STILL | {"held_out/rewards/c/mean": lambda s: 0.9 - 0.5 * s}),
        (["truncated"], {}, None, {"completions/clipped_ratio": 0.995}),
        ([], {}, None, {"completions/clipped_ratio": 0.985}),
        (
            ["empty completions"],
            {},
            texts(1),
            {"completions/mean_length": lambda s: 25 * (s < 0.5)},
        ),
        (["conflict"], TWO, texts(a=lambda k: k, b=lambda k: -k), {}),
        ([], TWO, texts(a=lambda k: k, b=lambda k: (k * 2) % 5), {}),
        (
            [],
            {"REWARDS": [REWARDS[0], REWARDS[1] | {"WEIGHT": -1.0}]},
            texts(a=lambda k: k, b=lambda k: -k),
            {},
        ),
        (["one reward drowns"], TWO, None, {"rewards/a/share": 0.99, "rewards/b/share": 0.01}),
        ([], TWO, None, {"rewards/a/share": 0.9, "rewards/b/share": 0.1}),
        (["dead reward"], TWO, texts(a=lambda k: 1.0, b=lambda k: k), {"rewards/b/share": 1.0}),
        (["reward missing"], {}, None, {"rewards/a/missing": 0.4}),
        ([], {}, None, {"rewards/a/missing": 0.1}),
        (["gradient not finite"], {}, None, {"skipped": lambda s: round(10 * s)}),
        ([], {}, None, {"skipped": lambda s: int(s > 0.5)}),
    ],
)
def test_each_line_is_drawn_between_two_runs(tmp_path, expected, config, samples, figures):
    assert kinds(a_run(tmp_path, config, samples, **figures)) == expected


@pytest.mark.parametrize(
    ("asked", "missing", "evidence"),
    [(2, 0.75, None), (2, 0.9, None), (6, 0.5, "50% of its scores in 40 steps, of which its ASK "
     "leaves out 25%"), (None, 0.3, "30% of its scores in 40 steps"), (99, 0.1, None)],
)  # fmt: skip
def test_what_nobody_was_asked_about_is_not_missing(tmp_path, asked, missing, evidence):
    people = {"TYPE": "human", "NAME": "anna", "WEIGHT": 1.0, "ASK": asked}
    run = a_run(
        tmp_path, {"REWARDS": [people], "BATCH_SIZE": 8}, **{"rewards/anna/missing": missing}
    )
    found = [each for each in findings(read_run(run)) if each.kind == "reward missing"]
    assert [each.evidence for each in found] == ([evidence] if evidence else [])
    assert all("TIMEOUT of 'anna'" in each.advice for each in found)


def test_an_end_of_text_that_ends_nothing_is_a_wrong_eos(tmp_path):
    run = a_run(tmp_path, {}, texts(32), **{"completions/clipped_ratio": 1.0})
    (run / "final/config.json").write_text('{"eos_token_id": 7}')
    assert kinds(run) == ["wrong EOS"]
    (run / "final/config.json").write_text('{"eos_token_id": 8}')
    assert kinds(run) == ["truncated"]


@pytest.mark.parametrize(("kind", "named"), [("judge", "judge"), ("length", "reward raises")])
def test_a_pause_is_the_judges_or_the_rewards(tmp_path, kind, named):
    keys = {"REWARDS": [{"TYPE": kind, "NAME": "a", "WEIGHT": 1.0}]}
    event = {"step": STEPS, "kind": "paused", "message": "reward 'a' failed", "action": "stop"}
    run = a_run(tmp_path, keys)
    (run / "final/manifest.json").unlink()
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert kinds(run) == [named]
    (run / "events.jsonl").write_text(json.dumps(event | {"kind": "stopped"}) + "\n")
    assert kinds(run) == [], "somebody wanted it"


def test_a_torn_line_is_said_and_its_step_is_left_out(tmp_path, capsys):
    run = a_run(tmp_path)
    (run / "final/manifest.json").unlink()
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-30])
    assert kinds(run) == ["torn line"]
    assert adaptiverl(["doctor", str(run)]) == 1
    said = capsys.readouterr().out
    assert "metrics.jsonl: a line is no JSON; the last whole step is 39" in said
    assert adaptiverl(["report", str(run)]) == 0
    zeros = text.splitlines()
    zeros[20] = "\0" * 40
    (run / "metrics.jsonl").write_text("\n".join(zeros) + "\n")
    assert read_run(run).step == STEPS and kinds(run) == ["torn line"]


def test_a_run_that_was_taken_back_says_so(tmp_path):
    run = a_run(tmp_path)
    event = {"step": 9, "kind": "collapsed", "message": "KL", "action": "rollback"}
    (run / "events.jsonl").write_text(2 * (json.dumps(event) + "\n"))
    (found,) = findings(read_run(run))
    assert found.kind == "rolled back" and "2 times" in found.says and "step 9" in found.evidence


def test_without_a_trust_region_a_run_was_taken_back_because_of_its_rate(tmp_path):
    """No curve shows it: the steps that collapsed are gone."""
    run = a_run(tmp_path, {"LR_RULE": "none", "LRATE": 1e-3})
    event = {"step": 9, "kind": "collapsed", "message": "one text", "action": "rollback"}
    stop = event | {"step": STEPS, "action": "stop"}
    (run / "final/manifest.json").unlink()
    (run / "events.jsonl").write_text(json.dumps(event) + "\n" + json.dumps(stop) + "\n")
    (found,) = findings(read_run(run))
    assert found.kind == "rate too large" and "step 9: one text" in found.evidence


def test_every_cause_has_its_place(tmp_path):
    assert {fault.expected for fault in FAULTS.values()} <= set(ORDER)
    assert len(FAULTS) >= 20 and len(SOUND) == 20


# No verdict from noise


def test_standard_errors_by_hand():
    seen = change([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    assert seen.first == 2 and seen.last == 6
    assert seen.error == pytest.approx((1 / 3 + 4 / 3) ** 0.5)
    assert seen.z == pytest.approx(4 / (5 / 3) ** 0.5)
    assert change([1.0] * 3, [1.0] * 3).z == 0 and change([1.0] * 3, [2.0] * 3).z == float("inf")


def test_noise_is_hardly_ever_taken_for_a_trend():
    """A t of 18 degrees of freedom exceeds 3 in 0.8 % of the cases."""
    draws, said = random.Random(0), 0
    for _ in range(500):
        rows = [{"step": k, "reward": draws.gauss(0, 1)} for k in range(1, 41)]
        run = Run(Path("x"), {"STEPS": 40}, rows, [], [], [], [])
        said += "did not move beyond its noise" not in verdict(run, [])
    assert 0 < said <= 0.02 * 500


@pytest.mark.parametrize(("steps", "short"), [(29, True), (30, False)])
def test_a_short_run_is_said_to_be_short(steps, short):
    rows = [{"step": k, "reward": k / 10 + noise(k)} for k in range(1, steps + 1)]
    text = verdict(Run(Path("x"), {"STEPS": steps}, rows, [], [], [], []), [])
    assert text.startswith(f"This is a short run, of {steps} steps") == short
    assert "the reward rose from" in text
