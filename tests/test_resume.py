"""What a resumed run finds: prompts that have changed, checkpoints and lines that are gone."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import PROMPTS, read_jsonl, without_clock
from datasets import Dataset

from adaptiverl.files import checkpoint
from adaptiverl.rl.data import fingerprint, load_prompts

ANEW = "To start anew leave RESUME out: what is there is then put aside, in earlier-001 or so"


def write(text: str):
    return lambda folder: (folder / "weights").write_text(text)


# Prompts


def test_a_fingerprint_is_of_values_and_their_order(tmp_path):
    one = [{"prompt": "This", "n": 1, "m": [1, "x"]}, {"prompt": "That", "n": 2, "m": {"a": None}}]
    others = [one[::-1], one[:1], [one[0], one[1] | {"n": 3}], [one[0], one[1] | {"m": [1]}]]
    found = []
    for rows in (one, *others):
        (tmp_path / "a.json").write_text(json.dumps(rows))
        found.append(fingerprint(load_prompts(str(tmp_path / "a.json"), "prompt")))
    assert len(set(found)) == len(found)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one))
    same = load_prompts(str(tmp_path / "b.jsonl"), "prompt")
    assert fingerprint(same) == found[0] == fingerprint(same.select([1, 0]).select([1, 0]))


def test_all_rows_are_in_a_fingerprint():
    """More than what is read at once."""
    rows = [{"prompt": str(k)} for k in range(20_001)]
    whole = fingerprint(Dataset.from_list(rows))
    assert whole != fingerprint(Dataset.from_list([*rows[:-1], {"prompt": "x"}]))


@pytest.fixture
def finished(main, settings, tmp_path) -> dict:
    """The keys of a run that is finished, with an EVAL_FILE."""
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(PROMPTS[:2]))
    settings = settings | {"EVAL_FILE": str(path), "EVAL_EVERY": 9, "STEPS": 1}
    assert main(settings) == 0
    return settings | {"RESUME": "auto", "STEPS": 2}


@pytest.mark.parametrize("key", ["TRAIN_FILE", "EVAL_FILE"])
def test_rows_that_have_changed_are_refused(main, finished, capsys, key):
    path = Path(finished[key])
    before = path.read_text()
    path.write_text(before.replace("This", "These"))
    assert main(finished) == 2
    final = Path(finished["OUTPUT_DIR"], "final")
    also = ", or give the new ones another name" if key == "EVAL_FILE" else ""
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: RESUME: {path} has other rows than when {final} was written. A resumed run "
        f"continues as it was: put its rows back{also}. For another run, start a new one with "
        f"MODEL={final} and another OUTPUT_DIR"
    )
    if key == "EVAL_FILE":
        other = path.with_name("other.json")
        path.rename(other)
        assert main(finished | {"EVAL_FILE": str(other)}) == 0
    else:
        path.write_text(json.dumps(json.loads(before), indent=1))
        assert main(finished) == 0, "the same rows, written otherwise"


def test_a_run_of_a_version_without_fingerprints_goes_on(main, finished):
    final = Path(finished["OUTPUT_DIR"], "final")
    (final / "prompts.json").unlink()
    manifest = json.loads((final / "manifest.json").read_text())
    del manifest["files"]["prompts.json"]
    (final / "manifest.json").write_text(json.dumps(manifest))
    path = Path(finished["TRAIN_FILE"])
    path.write_text(path.read_text().replace("This", "These"))
    assert main(finished) == 0


# Checkpoints


def test_before_the_first_step_anything_may_change(main, settings, tmp_path, monkeypatch, capsys):
    """A reward that failed is corrected in the config, too; nothing has been learned from it."""
    (tmp_path / "early.py").write_text("def wrong(completions, **_):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = Path(settings["OUTPUT_DIR"])
    wrong = settings | {"REWARDS": [{"TYPE": "python", "FUNCTION": "early:wrong"}]}
    assert main(wrong) == 3
    assert main(wrong | {"RESUME": "auto"}) == 3, "the same config goes on from the checkpoint"
    assert capsys.readouterr().out == f"resumed after step 0 from {out / 'step-000000'}\n"
    assert main(settings | {"RESUME": "auto", "STEPS": 1, "OPTIM": "sgd"}) == 0
    assert capsys.readouterr().out.startswith(
        f"no step has been made in {out}, and the config has changed: starting a new run\n"
    )
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [1]
    assert (out / "earlier-001/step-000000").is_dir()


def test_a_run_that_was_taken_back_to_its_start_is_no_new_one(main, settings, capsys):
    keys = settings | {"LRATE": 50, "LR_RULE": "none", "STEPS": 60, "LOG_EVERY": 0}
    assert main(keys | {"REWARDS": settings["REWARDS"][:1]}) == 3
    assert main(keys | {"RESUME": "auto"}) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: RESUME: REWARDS was ")


def test_best_is_resumed_where_nothing_else_is_left(tmp_path, caplog):
    checkpoint.save(tmp_path / "best", 2, write("best"))
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.to_resume(tmp_path) == tmp_path / "best"
    assert caplog.messages == [
        f"no other checkpoint in {tmp_path} is undamaged: going on from best/"
    ]
    checkpoint.save(tmp_path / "step-000001", 1, write("one"))
    assert checkpoint.to_resume(tmp_path) == tmp_path / "step-000001", "best may be taken back"
    (tmp_path / "step-000001" / "weights").write_text("flipped")
    assert checkpoint.to_resume(tmp_path) == tmp_path / "best"
    (tmp_path / "best").rename(tmp_path / ".old-best")
    assert checkpoint.to_resume(tmp_path) == tmp_path / ".old-best", "a kill between renames"


@pytest.mark.parametrize(("step", "is_used"), [(1, True), (2, False), (5, False)])
def test_best_is_not_resumed_where_its_step_may_have_been_taken_back(
    tmp_path, caplog, step, is_used
):
    checkpoint.save(tmp_path / "best", 2, write("best"))
    rows = [{"step": 9, "action": "warn"}, {"step": step, "action": "rollback"}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines, '{"step": 12, "act']))
    found = checkpoint.to_resume(tmp_path)
    assert (found == tmp_path / "best") == is_used
    if not is_used:
        why = f"its step 2 may have been taken back after step {step}"
        assert caplog.messages == [f"{tmp_path / 'best'} is not used: {why}"]
        assert found == f"all checkpoints in {tmp_path} are damaged. {ANEW}"


@pytest.mark.parametrize("name", ["step-000002", "final", "best"])
def test_no_run_begins_again_beside_damaged_checkpoints(tmp_path, name):
    checkpoint.save(tmp_path / name, 2, write("two"))
    (tmp_path / name / "weights").write_text("flipped")
    assert checkpoint.to_resume(tmp_path) == f"all checkpoints in {tmp_path} are damaged. {ANEW}"
    (tmp_path / name / "manifest.json").unlink()
    assert checkpoint.to_resume(tmp_path) == f"all checkpoints in {tmp_path} are damaged. {ANEW}"


@pytest.mark.parametrize(
    ("steps", "save_every", "begins"),
    [(3, 3, True), (4, 3, False), (4, 0, True), (4, None, True), (0, 3, True)],
)
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
    tmp_path, steps, save_every, begins
):
    """One that has written more steps had one."""
    assert checkpoint.to_resume(tmp_path / "nowhere") is None
    (tmp_path / "config.json").write_text(json.dumps({"SAVE_EVERY": save_every}))
    (tmp_path / ".new-step-000003").mkdir()
    rows = "".join(json.dumps({"step": step + 1}) + "\n" for step in range(steps))
    (tmp_path / "metrics.jsonl").write_text(rows)
    said = f"the run in {tmp_path} has {steps} steps and no checkpoint any more. {ANEW}"
    assert checkpoint.to_resume(tmp_path) == (None if begins else said)


def test_a_run_without_a_sound_checkpoint_is_told_how_to_start_anew(main, settings, capsys):
    out = Path(settings["OUTPUT_DIR"])
    assert main(settings) == 0
    (out / "final" / "trainer.pt").write_bytes(b"torn")
    assert main(settings | {"RESUME": "auto"}) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: RESUME: all checkpoints in {out} are damaged. {ANEW}"
    assert main(settings) == 0
    assert len(read_jsonl(out / "earlier-001" / "metrics.jsonl")) == 3


def test_a_run_that_goes_on_from_best_is_the_uninterrupted_run(main, settings, tmp_path, capsys):
    (tmp_path / "eval.json").write_text(json.dumps(PROMPTS[:2]))
    out = Path(settings["OUTPUT_DIR"])
    keys = settings | {"EVAL_FILE": str(tmp_path / "eval.json"), "EVAL_EVERY": 2}
    assert main(keys) == 0
    whole = without_clock(read_jsonl(out / "metrics.jsonl"))
    shutil.rmtree(out / "final")
    capsys.readouterr()
    assert main(keys | {"RESUME": "auto"}) == 0
    assert f"resumed after step 2 from {out / 'best'}" in capsys.readouterr().out
    assert without_clock(read_jsonl(out / "metrics.jsonl")) == whole


# Lines


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (0, "has no steps, the checkpoint is of step 3: steps 1 to 3 are missing from it"),
        (1, "ends at step 1, the checkpoint is of step 3: steps 2 to 3 are missing from it"),
        (2, "ends at step 2, the checkpoint is of step 3: step 3 is missing from it"),
        (3, None),
    ],
)
def test_lines_that_are_missing_beside_a_checkpoint(main, settings, caplog, left, words):
    settings |= {"TRUST_REGION_SCHEDULE": "constant"}
    assert main(settings) == 0
    out = Path(settings["OUTPUT_DIR"])
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    if left:
        (out / "metrics.jsonl").write_text("".join(lines[:left]) + '{"st')
    else:
        (out / "metrics.jsonl").unlink()
    caplog.clear()
    assert main(settings | {"RESUME": "auto", "STEPS": 4}) == 0
    events = read_jsonl(out / "events.jsonl") if (out / "events.jsonl").exists() else []
    lost = [row for row in events if row["kind"] == "metrics lost"]
    said = [message for message in caplog.messages if "missing from it" in message]
    if words is None:
        assert not lost and not said
    else:
        want = {"step": 3, "kind": "metrics lost", "action": "warn"}
        assert lost == [want | {"message": f"metrics.jsonl {words}"}]
        assert said == [f"step 3: metrics.jsonl {words}"]
