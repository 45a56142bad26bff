"""The file of a `python` reward that has changed: what RESUME and the commands say of it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import PROMPTS, in_this_process, read_jsonl, written_run

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.commands.curves import comparable, read_run
from adaptiverl.commands.doctor import doctor
from adaptiverl.commands.explain import explain
from adaptiverl.commands.report import write_report
from adaptiverl.training.best import Best
from adaptiverl.training.guards import Guards
from adaptiverl.training.keys import RunConfig
from rewards import PythonReward
from rewards.function import Source

CODE = """
def scale(completions, **_):
    return [{} * (1 + len(text) / 100) for text in completions]
"""
MODULE = """
from rewards import LengthReward
class Own:
    def __call__(self, completions, **_): ...
one = Own()
def f(completions, **_): ...
"""


@pytest.fixture
def code(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Writes the module edited.py with this text, which the next run imports anew; its path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> Path:
        monkeypatch.delitem(sys.modules, "edited", raising=False)
        path = tmp_path / "edited.py"
        path.write_text(text)
        return path

    yield write
    sys.modules.pop("edited", None)


@pytest.fixture
def keys(settings, tmp_path) -> dict:
    (tmp_path / "eval.json").write_text(json.dumps([{"prompt": "A film"}, {"prompt": "He said"}]))
    return settings | {
        "REWARDS": [{"TYPE": "python", "FUNCTION": "edited:scale"}],
        "EVAL_FILE": str(tmp_path / "eval.json"),
        "EVAL_EVERY": 2,
        "STEPS": 4,
    }


def warned(out: Path) -> list[dict]:
    events = read_jsonl(out / "events.jsonl") if (out / "events.jsonl").exists() else []
    return [row for row in events if row["kind"] == "reward code"]


def best(out: Path) -> tuple[int, float]:
    row = json.loads((out / "best/best.json").read_text())
    return row["step"], row["eval/score"]


@pytest.mark.parametrize("factor", ["6.00", "-6.00"])
def test_a_reward_with_other_code_is_told_and_the_best_is_looked_for_anew(
    main, keys, code, caplog, factor
):
    """Whichever scale is the higher one."""
    out, file = Path(keys["OUTPUT_DIR"]), code(CODE.format(1))
    assert main(keys) == 0
    before = best(out)
    code(CODE.format(factor))
    assert main(keys | {"RESUME": "auto", "STEPS": 8}) == 0
    said = (
        f"the code of 'scale' ({file}) has changed since the checkpoint of step 4: rewards up to "
        f"this step and after it cannot be compared. best/ is of before: it is now "
        f"{out}/earlier-001/best. For rewards that can be compared, start a new run with another "
        "OUTPUT_DIR"
    )
    assert warned(out) == [{"step": 4, "kind": "reward code", "message": said, "action": "warn"}]
    assert f"step 4: {said}" in caplog.messages
    assert best(out / "earlier-001") == before
    scores = {
        r["step"]: r["eval/score"]
        for r in read_jsonl(out / "metrics.jsonl")[4:]
        if "eval/score" in r
    }
    assert best(out)[0] in scores and best(out)[1] == max(scores.values())
    assert main(keys | {"RESUME": "auto", "STEPS": 10}) == 0
    assert len(warned(out)) == 1, "the code is that of the checkpoint now"
    found, status = doctor(out)
    says = (
        "the code of a reward has changed in the run: rewards before and after cannot be compared"
    )
    assert status == 1 and f"{says}\n   evidence: after step 4: {said}" in found
    assert f"WARNING      {says}: after step 4: {said}" in explain(out)


def test_a_best_of_before_does_not_win_where_no_evaluation_follows(main, keys, code, capsys):
    out, _ = Path(keys["OUTPUT_DIR"]), code(CODE.format(1))
    assert main(keys) == 0
    code(CODE.format("6.00"))
    capsys.readouterr()
    assert main(keys | {"RESUME": "auto", "STEPS": 5}) == 0
    assert not (out / "best").exists() and "best:" not in capsys.readouterr().out


def test_a_run_that_is_done_stays_as_it_is(main, keys, code):
    out, _ = Path(keys["OUTPUT_DIR"]), code(CODE.format(1))
    assert main(keys) == 0
    code(CODE.format("6.00"))
    assert main(keys | {"RESUME": "auto"}) == 0
    assert not warned(out) and (out / "best").is_dir()


def test_a_held_out_reward_with_other_code_leaves_the_best(main, settings, keys, code):
    out, file = Path(keys["OUTPUT_DIR"]), code(CODE.format(1))
    held_out = keys | {"REWARDS": settings["REWARDS"], "HELD_OUT": keys["REWARDS"]}
    assert main(held_out) == 0
    code(CODE.format("6.00"))
    assert main(held_out | {"RESUME": "auto", "STEPS": 5}) == 0
    assert [row["message"] for row in warned(out)] == [
        f"the code of 'scale' ({file}) has changed since the checkpoint of step 4: rewards up to "
        "this step and after it cannot be compared. For rewards that can be compared, start a new "
        "run with another OUTPUT_DIR"
    ]
    assert (out / "best").is_dir()


def test_a_run_of_a_version_without_fingerprints_says_nothing(main, keys, code, capsys):
    out, _ = Path(keys["OUTPUT_DIR"]), code(CODE.format(1))
    assert main(keys) == 0
    for name in ("final", "best"):
        (out / name / "reward_code.json").unlink()
        (out / name / "prompts.json").unlink()
        manifest = json.loads((out / name / "manifest.json").read_text())
        del manifest["files"]["reward_code.json"], manifest["files"]["prompts.json"]
        (out / name / "manifest.json").write_text(json.dumps(manifest))
    code(CODE.format("6.00"))
    Path(keys["EVAL_FILE"]).write_text(json.dumps(PROMPTS))
    with in_this_process():
        assert adaptiverl(["evaluate", str(out), "-n", "2"]) == 0
    assert json.loads((out / "evaluation.json").read_text())["notes"] == []
    assert main(keys | {"RESUME": "auto", "STEPS": 5}) == 0
    assert not warned(out) and (out / "best").is_dir()


def test_a_reward_that_failed_in_the_first_step_is_corrected_without_a_word(main, keys, code):
    out, _ = Path(keys["OUTPUT_DIR"]), code("def scale(completions, **_):\n    return [1.0]\n")
    assert main(keys) == 3
    code(CODE.format("6.00"))
    assert main(keys | {"RESUME": "auto"}) == 0
    assert not warned(out)


@pytest.mark.parametrize("key", ["EVAL_FILE", "EVAL_SPLIT", "TRAIN_FILE"])
def test_evaluate_says_what_is_no_longer_that_of_the_run(main, keys, code, caplog, key):
    out, file = Path(keys["OUTPUT_DIR"]), code(CODE.format(1))
    path = Path(keys["EVAL_FILE" if key == "EVAL_FILE" else "TRAIN_FILE"])
    if key != "EVAL_FILE":
        del keys["EVAL_FILE"], keys["EVAL_EVERY"]
    if key == "EVAL_SPLIT":
        keys |= {"EVAL_SPLIT": 0.4, "EVAL_EVERY": 2}
    assert main(keys) == 0
    command = ["evaluate", str(out), "-n", "2", "--checkpoint", "final"]

    def notes(*words: str) -> list[str]:
        caplog.clear()
        with in_this_process():
            assert adaptiverl([*command, *words]) == 0
        found = json.loads((out / "evaluation.json").read_text())["notes"]
        assert [each for each in caplog.messages if "run" in each] == found
        return found

    assert notes() == []
    code(CODE.format("6.00"))
    other_code = (
        f"the code of 'scale' ({file}) has changed since the run wrote {out}/final: these scores "
        "are not those of the run"
    )
    assert notes() == [other_code]
    path.write_text(path.read_text().replace('"}', '!"}').replace("film", "movie"))
    other_rows = (
        f"{path} has other rows than when the run wrote {out}/final: these figures are not of the "
        "prompts that the run had"
    )
    assert notes() == [other_rows, other_code]
    assert notes("--prompts", str(path)) == [other_code]


def test_what_is_watched_is_the_file_that_defines_the_function(code, monkeypatch):
    file = code(MODULE)
    made = ModuleType("made")
    made.__dict__["f"] = lambda completions, **_: None
    made.__dict__["f"].__module__ = "made"
    monkeypatch.setitem(sys.modules, "made", made)

    def file_of(name: str, **args: int) -> str | None:
        source = PythonReward(function=name, args=args).source
        return source and source.file

    assert file_of("edited:f") == file_of("edited:Own") == file_of("edited:one") == str(file)
    assert file_of("edited:LengthReward", max=3) == sys.modules["rewards.text"].__file__
    assert file_of("made:f") is None


def test_a_process_knows_the_code_that_it_has_imported(code):
    """A rollback makes the rewards anew, from the module that is loaded."""
    file = code(CODE.format(1))
    first = PythonReward(function="edited:scale").source
    assert isinstance(first, Source)
    file.write_text(CODE.format("6.00"))
    assert PythonReward(function="edited:scale").source == first
    code(CODE.format("6.00"))
    assert PythonReward(function="edited:scale").source != first


def test_what_is_forgotten_of_rewards():
    kept = Best(RunConfig(EVAL_FILE="x.json", STOP_PATIENCE=1))
    for step in (1, 2):
        kept.look(step, {"reward": 1.0, "kl_per_completion": 0.5, "eval/score": 1.0})
    assert kept.why_stop is not None
    kept.forget()
    assert kept.why_stop is None
    assert kept.state_dict() == {
        "best_step": None,
        "best_score": None,
        "since": 0,
        "recent": {"kl_per_completion": [0.5, 0.5]},
    }
    names = ("reward", "reward_fixed_scale", "eval/reward", "held_out/rewards/x/mean", "kl")
    guards = Guards(RunConfig(), 9, 1e-3)
    guards.first, guards.series = dict.fromkeys(names, 1.0), {name: [1.0] for name in names}
    guards.forget_rewards()
    assert guards.first == {"kl": 1.0} and guards.series == {"kl": [1.0]}


def test_rewards_are_measured_since_their_code_changed(tmp_path):
    rows = [
        {"step": k, "reward": 6.0 if k > 10 else 1.0, "rewards/r/mean": 1.0, "lr": 1.0, "kl": 0.1}
        for k in range(1, 21)
    ]
    event = {"step": 10, "kind": "reward code", "message": "it changed", "action": "warn"}
    path = written_run(tmp_path / "run", rows, {"STEPS": 20}, events=[event])
    run = read_run(path)
    assert comparable(run, "reward") == [(k, 6.0) for k in range(11, 21)]
    assert [step for step, _ in comparable(run, "rewards/r/mean")] == [*range(11, 21)]
    assert [step for step, _ in comparable(run, "kl")] == [*range(1, 21)]
    assert run.change("reward") == (6.0, 6.0, 0.0)
    said = explain(path)
    assert "from a mean of 6 (steps 11 to 13) to 6 (steps 18 to 20), ± 0." in said
    assert "reward       6 in steps 11 to 13, 6 in steps 18 to 20 (± 0)" in said
    assert "highest      reward 6.000 around step 11, smoothed" in said
    page = write_report(path).read_text("utf-8")
    assert "<b>6</b><span>mean of the last 3 steps, 6 of the first</span>" in page
