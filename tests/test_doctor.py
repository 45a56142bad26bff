"""The doctor: real runs with a fault, and figures on both sides of each line that it draws.

All 26 faults and 20 sound runs are in benchmarks/doctor.py.
"""

import json
import math
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl, written_run

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.commands.curves import Run, change, read_run
from adaptiverl.commands.doctor import ORDER, doctor, findings
from adaptiverl.commands.explain import explain
from adaptiverl.commands.report import write_report
from adaptiverl.commands.sample_facts import facts_of
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
SURE = {"entropy": lambda s: 3.0 * (1 - s) + 0.01}


def one_text(**shares: float) -> dict:
    return {f"completions/equal_{of}_prompts": share for of, share in shares.items()}


@pytest.mark.parametrize(
    ("expected", "config", "samples", "figures"),
    [
        ([], {}, None, {}),
        (["entropy collapse"], {}, None, {"entropy": lambda s: 3.0 * (1 - s) + 0.01}),
        (["entropy collapse"], {}, None, SURE | one_text(within=1.0, across=0.9)),
        (["entropy collapse"], {}, None, SURE | one_text(within=1.0, across=0.5) | STILL),
        ([], {}, None, SURE | one_text(within=1.0, across=0.5)),
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
    [(2, 0.75, None), (2, 0.9, None), (6, 0.5, "50% of its scores in 40 steps; its ASK leaves out "
     "25% of all scores"), (None, 0.3, "30% of its scores in 40 steps"), (99, 0.1, None)],
)  # fmt: skip
def test_what_nobody_was_asked_about_is_not_missing(tmp_path, asked, missing, evidence):
    people = {"TYPE": "human", "NAME": "anna", "WEIGHT": 1.0, "ASK": asked, "TIMEOUT": 60.0}
    run = a_run(
        tmp_path, {"REWARDS": [people], "BATCH_SIZE": 8}, **{"rewards/anna/missing": missing}
    )
    found = [each for each in findings(read_run(run)) if each.kind == "reward missing"]
    assert [each.evidence for each in found] == ([evidence] if evidence else [])
    assert all("TIMEOUT of 'anna'" in each.advice for each in found)


FEW = "and its head had fewer than the 20 labels that it needs"
SET = "or set LABELS to a file that has 20 labels of the same QUESTION"
IN_TIME, SKIP = "raise TIMEOUT of 'anna'", "change QUESTION of 'anna' so that people skip fewer"


@pytest.mark.parametrize(
    ("keys", "head_from", "why", "advice"),
    [
        ({"TIMEOUT": 4.0}, None, "people skipped them, or gave no label in time",
         f"{IN_TIME}, or let a head fill in (REWARD_MODEL online)"),
        ({"TIMEOUT": None}, None, "people skipped them",
         f"{SKIP}, or let a head fill in (REWARD_MODEL online)"),
        ({"TIMEOUT": 4.0, "REWARD_MODEL": "online"}, None,
         f"people skipped them, or gave no label in time, {FEW}", f"{IN_TIME}, {SET}"),
        ({"TIMEOUT": None, "REWARD_MODEL": "online"}, 31,
         f"people skipped them, {FEW} before step 31", f"{SKIP}, {SET}"),
    ],
)  # fmt: skip
def test_what_to_do_about_labels_that_are_missing(tmp_path, keys, head_from, why, advice):
    people = {"TYPE": "human", "NAME": "anna", "WEIGHT": 1.0, "ASK": None} | keys
    rows = metrics(**{"rewards/anna/missing": 0.5})
    for row in rows[head_from - 1 :] if head_from else ():
        row["anna/head_error"] = 0.4
    run = written_run(tmp_path / "run", rows, KEYS | {"REWARDS": [people]}, samples=texts())
    (found,) = [each for each in findings(read_run(run)) if each.kind == "reward missing"]
    assert found.says == f"the reward 'anna' is missing for many completions: {why}"
    assert found.advice == advice


@pytest.mark.parametrize(
    ("weight", "mean", "advice"),
    [
        (1.0, 0.5, "see which other program wrote to metrics.jsonl or samples.jsonl, and put them "
         "back from a copy if there is one"),
        (1e17, 0.5, "give the entries of REWARDS a smaller WEIGHT"),
        ([[0, 1.0], [9, -1e17]], 0.5, "give the entries of REWARDS a smaller WEIGHT"),
        (2.0, 9e15, "give the entries of REWARDS a smaller WEIGHT"),
    ],
)  # fmt: skip
def test_a_smaller_weight_is_advised_where_the_weighted_sum_is_large(
    tmp_path, weight, mean, advice
):
    keys = {"REWARDS": [REWARDS[0] | {"WEIGHT": weight}]}
    run = a_run(tmp_path, keys, **{"reward": None, "rewards/a/mean": mean})
    found = [each for each in findings(read_run(run)) if each.kind == "reward missing"]
    assert [each.advice for each in found] == [advice]
    assert ("1e16" in found[0].says) == (weight != 1.0)


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
    assert "line 40 of metrics.jsonl: no whole line; the last step that can be read is 39\n" in said
    assert "RESUME=auto cuts the line off and goes on\n" in said
    assert adaptiverl(["report", str(run)]) == 0
    zeros = text.splitlines()
    zeros[20] = "\0" * 40
    (run / "metrics.jsonl").write_text("\n".join(zeros) + "\n")
    assert read_run(run).step == STEPS and kinds(run) == ["torn line"]


@pytest.mark.parametrize(
    "value", [math.inf, math.nan, "high", [1.0], pytest.param(10**400, id="huge")]
)
def test_a_value_that_is_no_finite_number_is_said_and_counts_as_missing(tmp_path, capsys, value):
    run = a_run(tmp_path)
    rows = read_jsonl(run / "metrics.jsonl")
    sound = read_run(run).values("kl")
    for name in ("reward", "entropy", "kl", "lr", "kl_per_completion"):
        rows[6][name] = value
    rows[8]["kl"] = value
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = findings(read_run(run))[0]
    assert found.says == (
        "a file has values that are no finite numbers, or steps twice: they are left out"
    )
    assert found.evidence == (
        "line 7 of metrics.jsonl: reward, entropy, kl, kl_per_completion, lr; "
        "line 9 of metrics.jsonl: kl"
    )
    assert read_run(run).values("kl") == [x for k, x in enumerate(sound) if k not in (6, 8)]
    assert adaptiverl(["doctor", str(run)]) == 1
    assert adaptiverl(["explain", str(run)]) == 0
    assert found.evidence in capsys.readouterr().out
    assert f"<p>L{found.evidence[1:]}.</p>" in write_report(run).read_text()


def test_a_step_or_a_change_that_is_no_number_is_left_out(tmp_path):
    run = a_run(tmp_path)
    rows = read_jsonl(run / "metrics.jsonl")
    rows[4]["step"] = "five"
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change = {
        "step": 2, "hyperparameter": "lr", "rule": "plateau", "old": 1.0, "new": math.nan,
        "signal": "reward", "value": 0.5,
    }  # fmt: skip
    (run / "controller.jsonl").write_text(json.dumps(change) + "\n")
    read = read_run(run)
    assert len(read.metrics) == STEPS - 1 and read.changes == []
    assert findings(read)[0].evidence == (
        "line 5 of metrics.jsonl: step; line 1 of controller.jsonl: new"
    )
    assert adaptiverl(["explain", str(run)]) == 0 and write_report(run).exists()


def test_steps_that_come_twice_are_said_and_count_once(tmp_path, capsys):
    """As of a file that was appended to itself."""
    run = a_run(tmp_path)
    before = read_run(run).values("reward")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*rows, *rows[2:4]]) + "\n")
    assert read_run(run).values("reward") == before
    (found,) = findings(read_run(run))
    assert found.evidence == (
        "line 41 of metrics.jsonl: step 3 again; line 42 of metrics.jsonl: step 4 again"
    )
    assert doctor(run)[0].startswith(f"{run}: 40 steps of 40, finished\n")


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_of_something_else_is_not_a_line_that_was_cut_off(tmp_path, whole):
    run = a_run(tmp_path)
    (run / "controller.jsonl").write_text("garbage\n" * 9 + "garbage" + "\n" * whole)
    (found,) = findings(read_run(run))
    assert found.says == "lines of a file cannot be read"
    assert found.evidence.endswith("line 4 of controller.jsonl and 6 lines more: no JSON")


@pytest.mark.parametrize("text", ["{\n", "", "[]", "{}", "\xff"])
def test_a_config_that_cannot_be_read_is_said(tmp_path, capsys, text):
    run = a_run(tmp_path)
    (run / "config.json").write_text(text, "latin-1")
    (found,) = findings(read_run(run))
    assert found.says == (
        "config.json cannot be read, so what depends on keys and rewards is not checked"
    )
    assert found.advice == "put it back: it has the keys that the run was started with"
    (run / "final/run_config.json").write_text("{}")
    assert adaptiverl(["doctor", str(run)]) == 1
    said = capsys.readouterr().out
    mend = f"put {run / 'final/run_config.json'} in its place: it has the same keys"
    assert mend in said and "config.json is missing" not in said
    (run / "config.json").unlink()
    assert f"keys and rewards is not checked; {mend}\n" in doctor(run)[0], "the same advice"


def test_a_line_that_is_broken_in_the_middle_is_not_one_that_ends_the_file(tmp_path, capsys):
    """RESUME=auto does not mend it: it is said which steps are lost, and how to have it silent."""
    run = a_run(tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[5:7] = [lines[5][:50] + lines[6]]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (found,) = findings(read_run(run))
    assert found.kind == "torn line" and found.says == ("a line of a file cannot be read")
    assert found.evidence == "line 6 of metrics.jsonl: no JSON; metrics.jsonl lacks steps 6 and 7"
    assert "RESUME" not in found.advice and "delete what cannot be read" in found.advice
    assert adaptiverl(["explain", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{run}: steps 1 to 40 of 40, finished\n" in said
    assert "\nlost         metrics.jsonl lacks steps 6 and 7\n" in said
    assert write_report(run).read_text().count("metrics.jsonl lacks steps 6 and 7") == 2
    del lines[5]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert adaptiverl(["doctor", str(run)]) == 0
    head, second, *_ = capsys.readouterr().out.splitlines()
    assert head == f"{run}: 40 steps of 40, finished"
    assert second == "metrics.jsonl lacks steps 6 and 7"


def test_a_finished_run_that_lost_its_last_line_is_finished(main, settings, capsys):
    keys = settings | {"STEPS": 4, "SAVE_EVERY": 2}
    assert main(keys) == 0
    out = Path(settings["OUTPUT_DIR"])
    file = out / "metrics.jsonl"
    whole = file.read_bytes()

    def said() -> list[str]:
        capsys.readouterr()
        adaptiverl(["doctor", str(out)])
        return capsys.readouterr().out.splitlines()

    first, second, third, _ = whole.splitlines(keepends=True)
    file.write_bytes(first + second + third[:-100])
    assert said()[3].endswith("metrics.jsonl lacks steps 3 and 4")
    assert said()[4].endswith("cuts the line off; the run is finished"), "step 3 is lost too"
    file.write_bytes(whole[:-100])
    head, *rest = said()
    assert head == f"{out}: 4 steps of 4, finished"
    assert rest[2].endswith("the last step that can be read is 3; metrics.jsonl lacks step 4")
    assert rest[3].endswith("cuts the line off; nothing else is lost; the run is finished")
    assert main(keys | {"RESUME": "auto"}) == 0
    assert said()[:2] == [head, "metrics.jsonl lacks step 4"] and kinds(out) == []
    with (out / "final/model.safetensors").open("r+b") as weights:
        weights.write(b"12345678")
    assert read_run(out).state == "killed", "nobody goes on from a final/ that is damaged"


def test_a_manifest_that_says_nothing_is_told_and_not_called_a_kill(main, settings, capsys):
    assert main(settings | {"STEPS": 4, "SAVE_EVERY": 2}) == 0
    out = Path(settings["OUTPUT_DIR"])
    capsys.readouterr()
    (out / "final/manifest.json").write_text("[1, 2]", "utf-8")
    assert adaptiverl(["doctor", str(out)]) == 1
    head, _, says, evidence, advice, *_ = capsys.readouterr().out.splitlines()
    assert head == f"{out}: 4 steps of 4, finished or killed: final/ is damaged"
    assert says == "1. a checkpoint is damaged, and no command uses it"
    assert evidence.endswith(
        "final/manifest.json: it has no step, or no files; others: steps 2 and 4"
    )
    assert advice.startswith("   change:   put manifest.json back from a copy")
    assert "killed" not in kinds(out)


def test_a_run_that_was_killed_says_so_beside_another_damaged_checkpoint(tmp_path):
    run = a_run(tmp_path)
    shutil.rmtree(run / "final")
    (run / "step-000020").mkdir()
    (run / "step-000020/manifest.json").write_text("{", "utf-8")
    assert kinds(run)[:2] == ["damaged checkpoint", "killed"]


def test_rows_of_samples_that_lack_something_are_told(tmp_path):
    whole = {"step": 1, "prompt": "p", "completion": "c", "completion_ids": [1, 2], "reward": 0.1}
    lacking = {name: value for name, value in whole.items() if name != "completion"}
    run = a_run(tmp_path, samples=[whole, lacking, whole, *[lacking] * 4])
    (found,) = (each for each in findings(read_run(run)) if each.kind == "odd samples")
    assert found.evidence == "line 2, 4, 5, 6 and 1 line more"
    assert facts_of(read_run(run), []).count == 2


@pytest.mark.parametrize(
    ("every", "advice"),
    [
        (0, "start it again, with a SAVE_EVERY above 0, so that less is lost the next time"),
        (1, "start it again"),
        (50, "start it again, with a smaller SAVE_EVERY"),
    ],
)
def test_a_killed_run_without_a_checkpoint_gets_advice_that_can_be_followed(
    tmp_path, every, advice
):
    run = a_run(tmp_path, {"SAVE_EVERY": every})
    (run / "final/manifest.json").unlink()
    (found,) = findings(read_run(run))
    assert found.kind == "killed" and found.advice.split(";")[0] == advice
    assert found.says == (
        "the run ended without saying so: it was killed, its machine went off, its disk was full, "
        "or an error in the program ended it, which its console shows"
    )


@pytest.mark.parametrize(
    ("keys", "ended"),
    [
        ({"EPOCHS": 1}, "3 steps of 12, finished: EPOCHS 1 came before STEPS"),
        ({"EPOCHS": 9}, "12 steps of 12, finished\n"),
        ({"STOP_REWARD": -1}, "10 steps of 12, stopped early by STOP_REWARD: a reward of "),
    ],
)
def test_what_ended_a_run_before_its_steps_is_named(main, settings, capsys, keys, ended):
    assert main(settings | {"STEPS": 12} | keys) == 0
    out = settings["OUTPUT_DIR"]
    capsys.readouterr()
    adaptiverl(["doctor", out])
    assert capsys.readouterr().out.startswith(f"{out}: {ended}")
    adaptiverl(["explain", out])
    step, _, why = ended.partition(" steps of ")
    assert capsys.readouterr().out.startswith(f"{out}: steps 1 to {step} of {why}")


def test_who_stopped_a_run_is_named(tmp_path):
    run = a_run(tmp_path)
    (run / "final").rename(run / "step-000040")
    said = "stopped by SIGINT after step 40"
    event = {"step": 40, "kind": "stopped", "message": said, "action": "stop"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert doctor(run)[0].startswith(f"{run}: 40 steps of 40, {said}\n")


def test_a_sum_that_is_beyond_what_is_summed_is_named(main, settings, tmp_path, monkeypatch):
    (tmp_path / "of_any_size.py").write_text(
        "def up(completions, **_):\n    return [0.28 for _ in completions]\n"
        "def huge(completions, **_):\n    return [3e16 for _ in completions]\n"
        "def rarely(completions, **_):\n    return [3e16, *[None] * (len(completions) - 1)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    up = {"TYPE": "python", "FUNCTION": "of_any_size:up", "WEIGHT": 1e30}
    out = Path(settings["OUTPUT_DIR"])
    assert main(settings | {"REWARDS": [up]}) == 0
    (found,) = findings(read_run(out))
    assert found.kind == "reward missing" and "the sum by WEIGHT is beyond 1e16" in found.says
    assert found.evidence == (
        "no completion has a reward in 3 of 3 steps, the first is 1; WEIGHT: up 1e+30"
    )
    assert found.advice == "give the entries of REWARDS a smaller WEIGHT"
    (event,) = [each for each in read_jsonl(out / "events.jsonl") if each["kind"] == "missing"]
    assert event["message"] == (
        "no completion has a reward: up gave None, NaN, infinity or a number beyond 1e16 for all "
        "of them, or the sum by WEIGHT is beyond 1e16. Such a step trains nothing; look at REWARDS"
    )
    huge = {"TYPE": "python", "FUNCTION": "of_any_size:huge"}
    assert main(settings | {"REWARDS": [huge]}) == 0
    (found,) = findings(read_run(out))
    size = settings["BATCH_SIZE"]
    assert found.says == (
        "the reward 'huge' is missing for many completions: it gives NaN, infinity or numbers "
        f"beyond 1e16 ({3 * size}, first in step 1)"
    )
    rarely = {"TYPE": "python", "FUNCTION": "of_any_size:rarely"}
    assert main(settings | {"REWARDS": [rarely]}) == 0
    (found,) = findings(read_run(out))
    assert found.says.endswith(
        f"numbers beyond 1e16 (3, first in step 1) and None ({3 * size - 3})"
    )


def test_sums_that_are_beyond_it_in_a_part_of_the_completions_are_counted(tmp_path):
    rows = texts(a=float)
    for row in rows[::4]:
        row["reward"] = None
    (found,) = findings(read_run(a_run(tmp_path, {}, rows)))
    assert found.kind == "reward missing"
    assert found.evidence == "25% of 640 completions; WEIGHT: a 1.0"


def test_cut_completions_are_counted_in_words_that_say_the_limit(tmp_path):
    cut = {"completions/clipped_ratio": 0.995}
    (found,) = findings(read_run(a_run(tmp_path, **cut)))
    assert found.says == "almost all completions are cut off at MAX_NEW_TOKENS"
    assert found.evidence == "99.5 % of the completions were cut at 32 tokens, over 40 steps"


def test_without_a_config_it_is_said_that_keys_were_not_looked_at(tmp_path):
    run = a_run(tmp_path, **{"completions/clipped_ratio": 1.0})
    (run / "config.json").unlink()
    said, status = doctor(run)
    assert status == 1 and "None" not in said
    assert said.startswith(
        f"{run}: 40 steps of ?, finished\n"
        "config.json is missing, so what depends on keys and rewards is not checked\n"
    )
    assert "100 % of the completions were cut at MAX_NEW_TOKENS, over 40 steps\n" in said


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("samples", "what depends on completions is not checked"),
        ("controller", "what moved the rate or another hyperparameter is not known"),
        ("progress", "the same prompts before and after are not known"),
        ("environment", "where and with which versions it ran is not known"),
    ],
)
def test_of_a_file_that_is_gone_it_is_said_what_is_not_known(main, settings, capsys, name, why):
    """A run has them all, also where it had nothing to write there."""
    assert main(settings | {"LR_RULE": "none", "LRATE": 1e-4, "SAMPLES_EVERY": 0}) == 0
    out = Path(settings["OUTPUT_DIR"])
    whole = [doctor(out)[0], explain(out), write_report(out).read_text()]
    assert not any("is missing" in text for text in whole) and "nothing moved the" in whole[1]
    (out / f"{name}.jsonl").unlink()
    texts = [doctor(out)[0], explain(out), write_report(out).read_text()]
    assert [text.count(f"{name}.jsonl is missing, so {why}") for text in texts] == [1, 1, 1]
    assert ("nothing moved the rate" in texts[1]) == (name != "controller")


def test_a_run_without_a_report_misses_no_file(main, settings):
    assert main(settings | {"REPORT": False}) == 0
    out = Path(settings["OUTPUT_DIR"])
    assert not (out / "progress.jsonl").exists() and "is missing" not in doctor(out)[0]


@pytest.mark.parametrize("name", ["doctor", "explain", "report"])
def test_a_run_without_its_metrics_is_still_called_a_run(tmp_path, capsys, name):
    run = a_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    assert adaptiverl([name, str(run)]) == 2
    assert capsys.readouterr().err == (
        f"error: {run / 'metrics.jsonl'} is missing, so nothing is known of the run's steps: put "
        "it back from a copy. Its checkpoints do not need it: RESUME=auto goes on, generate uses "
        "them\n"
    )


def test_no_reward_makes_more_than_all_of_the_variance(tmp_path):
    shares = {"rewards/a/share": 1.002, "rewards/b/share": -0.002}
    (found,) = findings(read_run(a_run(tmp_path, TWO, **shares)))
    assert found.kind == "one reward drowns"
    assert found.evidence == "it makes 100.0% of the advantages' variance over 40 steps"


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


@pytest.mark.parametrize(
    ("least", "advice"), [(0.01, "lower MIN_LR"), (None, "raise TRUST_REGION_KL")]
)
def test_a_rate_that_the_line_search_always_brings_below_its_bound_is_named(
    tmp_path, least, advice
):
    """Where it is so in half of the steps, or close to the bound, the rate finds its way."""
    low = least or 1e-9

    def found(name: str, share: float, scale: float) -> list:
        held = {
            "update_scale": lambda s: scale if s <= share else 1.0,
            "lr": lambda s: low * scale if s <= share else low,
        }
        return findings(read_run(a_run(tmp_path / name, {"MIN_LR": least}, **held)))

    (finding,) = found("held", 0.6, 1e-3)
    assert finding.kind == "rate held" and finding.advice.startswith(advice)
    assert finding.evidence == (
        f"24 of 40 updates were scaled down to a rate far below {low:g}, where each step begins "
        "again: the first in step 1, the most in step 1, × 0.001"
    )
    assert found("half", 0.5, 1e-3) == found("close", 1.0, 0.6) == []


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("collapsed", "what that says, in a new run: RESUME=auto would make the same steps again"),
        ("nan", "what that says, in a new run: RESUME=auto would make the same steps again"),
        ("failed", "what that says; the same command with RESUME=auto goes on from the last check"),
    ],
)
def test_what_ends_in_a_collapse_is_not_resumed(tmp_path, kind, advice):
    run = a_run(tmp_path)
    (run / "final").rename(run / "step-000020")
    (run / "step-000020/manifest.json").write_text('{"step": 20, "files": {}}')
    event = {"step": STEPS, "kind": kind, "message": "a mistake", "action": "stop"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    (found,) = findings(read_run(run))
    assert found.kind == kind and found.advice.startswith(advice)


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
    assert text.count("±") == 2 and text.endswith(". ± is one standard error of the difference.")


def test_the_verdict_names_the_steps_of_its_means(tmp_path):
    """As explain does below, and the report in its tiles."""
    rows = [
        {"step": k, "reward": k / 10, "kl_per_completion": k / 2, "lr": 1e-3} for k in range(1, 13)
    ]
    for row in rows[::2]:
        row["held_out/rewards/c/mean"] = 0.5
    run = written_run(tmp_path / "run", rows, {"STEPS": 12})
    head = (
        "This is a short run, of 12 steps, which says little: the reward rose from a mean of 0.25 "
        "(steps 1 to 4) to 1.05 (steps 9 to 12), ± 0.091, at a mean KL of 5.25 nats per completion "
        "to the first policy (steps 9 to 12). ± is one standard error of the difference."
    )
    said = explain(run)
    assert said.splitlines()[1] == head
    assert "\nkl_per_completion 1.25 in steps 1 to 4, 5.25 in steps 9 to 12 (± 0.46)\n" in said
    assert head in write_report(run).read_text()
    short = Run(tmp_path, {"STEPS": 8}, rows[:8], [], [], [], [])
    assert verdict(short, []) == (
        "This is a short run, of 8 steps, which says little: too few steps to say whether the "
        "reward moved, at a KL of 4 nats per completion to the first policy (step 8)."
    )


def test_of_too_few_steps_the_verdict_says_so(tmp_path):
    rows = [{"step": k, "reward": 0.3} for k in (1, 2)]
    run = Run(tmp_path, {}, rows, [], [], [], [])
    assert verdict(run, []) == (
        "This is a short run, of 2 steps, which says little: too few steps to say whether the "
        "reward moved."
    )
    assert "little: no completion had a reward." in verdict(
        Run(tmp_path, {}, [{"step": 1, "reward": None}], [], [], [], []), []
    )


def test_a_verdict_has_the_evaluations():
    """In a short run most of the rise may lie within the first third of its steps."""
    rows = [{"step": k, "reward": 0.5, "entropy": 2.0} for k in range(1, 41)]
    for k, value in ((9, 0.6), (19, 0.7), (39, 0.9)):
        rows[k]["eval/reward"] = value
    text = verdict(Run(Path("x"), {"STEPS": 40}, rows, [], [], [], []), [])
    assert "; evaluations went from 0.6 (step 10) to 0.9 (step 40)." in text
