"""Checkpoints: whole or not there, damaged ones passed over, killed runs resumed exactly."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, RANDOM_REWARD, read_jsonl, without_clock
from safetensors.torch import load_file

from adaptiverl.files import checkpoint
from adaptiverl.files.logs import RunLog
from adaptiverl.training import state
from adaptiverl.training.keys import RunConfig


def write(text: str):
    return lambda folder: (folder / "weights").write_text(text)


def test_newest_is_the_highest_step_and_final_wins(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for name, step in (("step-000002", 2), ("step-000010", 10), ("final", 10)):
        checkpoint.save(tmp_path / name, step, write(name))
    assert checkpoint.newest(tmp_path) == (tmp_path / "final", 10)
    checkpoint.save(tmp_path / "step-000012", 12, write("later"))
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-000012", 12)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "weights").write_text("flipped"), "weights has changed"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"step": 2'), "manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[2]"), "no step, or no files"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, caplog, damage, words):
    checkpoint.save(tmp_path / "step-000001", 1, write("one"))
    checkpoint.save(tmp_path / "step-000002", 2, write("two"))
    damage(tmp_path / "step-000002")
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-000001", 1)
    assert "step-000002 is damaged" in caplog.text and words in caplog.text
    assert caplog.messages[0].endswith("): not used")


def test_a_write_that_fails_leaves_nothing_that_looks_complete(tmp_path):
    def fails(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path / "step-000001", 1, fails)
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(tmp_path / "step-000002", 2, write("two"))
    checkpoint.prune(tmp_path, keep=0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_a_checkpoint_appears_by_one_rename_after_all_of_it_is_on_disk(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), fsync(file)))

    def cut_off(self: Path, target: Path) -> None:
        events.append("rename")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", cut_off)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "step-000001", 1, write("one"))
    assert events == ["sync", "sync", "sync", "rename"]  # weights, manifest, their folder
    assert checkpoint.newest(tmp_path) is None
    monkeypatch.setattr(Path, "rename", rename)
    checkpoint.save(tmp_path / "step-000001", 1, write("one"))
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-000001", 1)


def test_a_replaced_checkpoint_survives_a_kill_between_the_renames(tmp_path):
    checkpoint.save(tmp_path / "final", 3, write("old"))
    (tmp_path / "final").rename(tmp_path / ".old-final")
    assert checkpoint.newest(tmp_path) == (tmp_path / ".old-final", 3)
    checkpoint.save(tmp_path / "final", 5, write("new"))
    assert checkpoint.newest(tmp_path) == (tmp_path / "final", 5)


@pytest.mark.skipif(os.name == "nt", reason="modes are those of Unix")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "weights").touch(mode=0o600)  # as safetensors makes its files

    before = os.umask(umask)
    try:
        checkpoint.save(tmp_path / "final", 1, write)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "final").iterdir()}
    assert modes == {"config.json": mode, "weights": mode, "manifest.json": mode}


def test_prune_keeps_the_newest_and_final(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / f"step-{step:06d}", step, write(str(step)))
    checkpoint.save(tmp_path / "final", 3, write("3"))
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final", "step-000002", "step-000003"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_does_not_crowd_out_the_last_whole_one(tmp_path, keep):
    """As after a run that went on from step 3, because those after it were damaged."""
    for step in (1, 2, 3, 8, 9):
        checkpoint.save(tmp_path / f"step-{step:06d}", step, write(str(step)))
    (tmp_path / "step-000008" / "weights").write_text("flipped")
    (tmp_path / "step-000009" / "manifest.json").write_text("{")
    checkpoint.prune(tmp_path, keep)
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-000003", 3)
    assert not (tmp_path / "step-000002").exists()
    written = tmp_path / "step-000004"
    checkpoint.save(written, 4, write("4"))
    checkpoint.prune(tmp_path, keep, written)
    assert checkpoint.newest(tmp_path) == (written, 4)
    assert not (tmp_path / "step-000003").exists()


def test_what_was_just_written_is_not_read_again(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save(tmp_path / f"step-{step:06d}", step, write(str(step)))
    monkeypatch.setattr("hashlib.file_digest", lambda file, _: pytest.fail(f"{file} was read"))
    checkpoint.prune(tmp_path, 1, tmp_path / "step-000002")
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_as_many_stay_as_were_asked_for(tmp_path, keep):
    for step in (8, 9, 10, 999_999, 1_000_000):
        checkpoint.save(tmp_path / f"step-{step:06d}", step, write(str(step)))
        checkpoint.prune(tmp_path, keep)
    left = [f"step-{step:06d}" for step in (8, 9, 10, 999_999, 1_000_000)[-keep:]]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(left)


def test_random_state_continues_every_generator_and_loads_without_pickle(tmp_path):
    torch.save(checkpoint.rng_state(), tmp_path / "rng.pt")

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = draw()
    assert draw() != first
    checkpoint.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == first


def test_the_log_drops_what_came_after_the_checkpoint_and_torn_lines(tmp_path):
    rows = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 4, "rew')
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n{"step": 1}\n{"step": 2}\n{"st')
    RunLog(tmp_path, step=2, last_step=9).close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"step": 1}, {"step": 1}, {"step": 2}]


def test_of_a_long_log_only_what_is_dropped_is_looked_at(tmp_path, monkeypatch):
    lines = [json.dumps({"step": k // 4, "prompt": "x" * 50}) + "\n" for k in range(4, 40_000)]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(lines))
    real, parsed = json.loads, []
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or real(text))
    RunLog(tmp_path, step=9_997, last_step=9_999).close()
    assert path.read_text() == "".join(lines[:-8])
    assert len(parsed) == 9, "two steps and one line before them"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("", ""),
        ('{"step": 3}\n', ""),
        ('{"step": 1}', ""),
        ('{"step": 1}\n' + 8 * "\0", '{"step": 1}\n'),
        ('{"step": 1}\n' + 8 * "\0" + "\n", '{"step": 1}\n'),
        ('{"step": 1}\n{"step": 2}\n\n', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n[1]\n', '{"step": 1}\n'),
        ('{"step": 1}\n3\nnull\n{}\n{"step": null}\n', '{"step": 1}\n'),
    ],
)
def test_the_end_of_a_log_may_be_anything(tmp_path, text, left):
    (tmp_path / "metrics.jsonl").write_text(text)
    RunLog(tmp_path, step=2, last_step=9).close()
    assert (tmp_path / "metrics.jsonl").read_text() == left


@pytest.mark.parametrize("main_process", [True, False])
def test_one_process_verifies_the_checkpoints_for_all(tmp_path, monkeypatch, main_process):
    """Instead of each of them hashing all of it: the others are told."""
    checkpoint.save(tmp_path / "step-000001", 1, write("one"))
    if not main_process:
        monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("it was verified again"))

    def from_main(found):
        assert found == (tmp_path / "step-000001" if main_process else None)
        return tmp_path / "step-000001"

    runtime = SimpleNamespace(is_main=main_process, from_main=from_main)
    config = RunConfig(RESUME="auto", OUTPUT_DIR=str(tmp_path))
    assert state.newest(config, runtime) == tmp_path / "step-000001"


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics, samples and final weights, bit for bit."""
    metrics = [without_clock(read_jsonl(out / "metrics.jsonl")) for out in (one, other)]
    assert metrics[0] == metrics[1]
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    weights = [load_file(out / "final" / "model.safetensors") for out in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture
def resumable(settings, monkeypatch, tmp_path):
    """A run that exercises all that a checkpoint must hold, Python's generator included."""
    (tmp_path / "noisy.py").write_text(RANDOM_REWARD)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    noise = {"TYPE": "python", "FUNCTION": "noisy:noise"}
    return settings | {
        "REWARDS": [*settings["REWARDS"], noise],
        "BASELINE": "ema",
        "KL_COEF_TARGET": 0.1,
        "STEPS": 100,
        "SAVE_EVERY": 3,
        "LOG_EVERY": 0,
        "RESUME": "auto",
    }


def steps_written(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(process: subprocess.Popen, out: Path, count: int) -> None:
    """Returns when the run has written `count` steps; fails if it ends before."""
    while steps_written(out) < count:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
            raise AssertionError(f"the run ended: {process.communicate()}")


def test_killed_at_ten_random_moments_and_resumed_is_the_uninterrupted_run(start, main, resumable):
    """SIGKILL while starting, in steps, in saves and between them."""
    out = Path(resumable["OUTPUT_DIR"])
    whole = out.with_name("whole")
    assert main(resumable | {"OUTPUT_DIR": str(whole)}) == 0

    rng, first_step = random.Random(0), 0.0  # seconds until a run's first step
    for kill in range(10):
        started, process = time.monotonic(), start(resumable)
        if kill % 5 == 4:
            moment = rng.uniform(0, first_step)
        else:
            before = steps_written(out)
            wait_for_steps(process, out, before + 1)
            first_step = time.monotonic() - started
            wait_for_steps(process, out, before + rng.randint(1, 6))
            moment = rng.uniform(0, 0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moment)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert main(resumable) == 0
    assert_same_run(whole, out)


def test_signals_save_say_so_and_exit_and_the_run_resumes_exactly(start, main, resumable):
    out = Path(resumable["OUTPUT_DIR"])
    keys = resumable | {"SAVE_EVERY": 0, "STEPS": 80}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process, before = start(keys), steps_written(out)
        wait_for_steps(process, out, before + 5)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        (line,) = errors.splitlines()
        assert line.startswith("stopping: saves as soon as this step ends. A second signal ends ")
        step = steps_written(out)
        assert before + 5 <= step < 80
        folder = out / f"step-{step:06d}"
        assert printed.splitlines()[-1] == (
            f"stopped by {number.name} after step {step}, saved in {folder}; RESUME=auto continues"
        )
        assert checkpoint.newest(out) == (folder, step)
    whole = out.with_name("whole")
    assert main(keys) == main(keys | {"OUTPUT_DIR": str(whole)}) == 0
    assert_same_run(whole, out)


def test_a_run_that_has_nothing_left_to_do_keeps_its_config(main, settings, capsys):
    assert main(settings) == 0
    file = Path(settings["OUTPUT_DIR"], "config.json")
    before = file.read_bytes()
    assert main(settings | {"RESUME": "auto", "STEPS": 2}) == 0
    assert "nothing is left to do: it has 3 steps, and STEPS is 2" in capsys.readouterr().out
    assert file.read_bytes() == before


def test_a_longer_run_goes_on_from_final(main, settings):
    out = Path(settings["OUTPUT_DIR"])
    whole = out.with_name("whole")
    settings |= {
        "TRUST_REGION_SCHEDULE": "constant"
    }  # else a longer run is another one from its first step
    assert main(settings | {"STEPS": 5, "OUTPUT_DIR": str(whole)}) == 0
    assert main(settings | {"STEPS": 3}) == 0
    assert main(settings | {"STEPS": 5, "RESUME": "auto"}) == 0
    assert_same_run(whole, out)


def test_a_resumed_run_says_where_it_goes_on_and_shows_its_last_step(main, settings, capsys):
    assert main(settings | {"TRUST_REGION_SCHEDULE": "constant"}) == 0
    capsys.readouterr()
    assert main(settings | {"TRUST_REGION_SCHEDULE": "constant", "STEPS": 5, "RESUME": "auto"}) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"resumed after step 3 from {Path(settings['OUTPUT_DIR']) / 'final'}"
    assert said[1].startswith("Step 5/5 |") and said[2].startswith("finished: 5 steps")


def test_a_run_that_is_made_longer_says_that_its_target_is_another(main, settings, capsys):
    """It falls over all steps, so that it jumps; and a run of that length goes otherwise."""
    keys = settings | {"TRUST_REGION_KL": 0.01, "RESUME": "auto", "STEPS": 2}
    said = []
    for changes in ({}, {"EPOCHS": 9}, {"STEPS": 4}, {"STEPS": 3}):
        assert main(keys | changes) == 0
        said += [line for line in capsys.readouterr().out.splitlines() if "target" in line]
    assert said == [
        "the run had 2 steps and has 4 now: from here on the trust region's target falls over 4"
    ]
    rows = read_jsonl(Path(settings["OUTPUT_DIR"], "metrics.jsonl"))
    targets = [row["update_kl_target"] for row in rows]
    assert targets == pytest.approx([0.01, 0.005, 0.005, 0.0025])


def test_two_runs_do_not_write_to_one_folder(main, settings, capsys):
    held = checkpoint.lock(Path(settings["OUTPUT_DIR"]))
    assert main(settings) == 2
    assert f"another run is writing to {settings['OUTPUT_DIR']}" in capsys.readouterr().err
    held.release()
    assert main(settings) == 0
    checkpoint.lock(Path(settings["OUTPUT_DIR"])).release()


@pytest.fixture
def replace_flock(monkeypatch, settings) -> Callable[[Callable[[int, int], None]], None]:
    """Replaces fcntl.flock for the lock of the run's folder alone: `datasets` locks files, too."""
    flock, lock = fcntl.flock, Path(settings["OUTPUT_DIR"], checkpoint.LOCK)

    def replace(other: Callable[[int, int], None]) -> None:
        def either(descriptor: int, how: int) -> None:
            own = lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat())
            (other if own else flock)(descriptor, how)

        monkeypatch.setattr(fcntl, "flock", either)

    return replace


@pytest.mark.parametrize("problem", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_refuses_no_run(main, settings, replace_flock, caplog, problem):
    def flock(*_):
        raise OSError(problem, "no locks here")

    replace_flock(flock)
    assert main(settings) == 0
    out = settings["OUTPUT_DIR"]
    assert f"{out} is on a file system without locks (no locks here)" in caplog.text


def test_what_is_locked_is_open_for_writing(main, settings, replace_flock):
    """NFS gives an exclusive lock on nothing else."""
    flock, modes = fcntl.flock, []

    def of_nfs(descriptor, how):
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        if modes[-1] == os.O_RDONLY:
            raise OSError(errno.EBADF, "bad file descriptor")
        flock(descriptor, how)

    replace_flock(of_nfs)
    assert main(settings) == 0
    assert modes, "nothing was locked: the test would show nothing"


def test_a_lock_that_fails_otherwise_is_told(main, settings, replace_flock, capsys):
    def flock(*_):
        raise OSError(errno.EIO, "the disk is broken")

    replace_flock(flock)
    assert main(settings) == 2
    assert "the disk is broken" in capsys.readouterr().err.splitlines()[-1]


def test_resuming_as_another_kind_of_run_is_refused_before_it_loads(main, settings, capsys):
    assert main(settings) == 0
    assert main(settings | {"RESUME": "auto", "FULLTUNE": False}) == 2
    assert "FULLTUNE was True" in capsys.readouterr().err


def test_resuming_with_another_setting_is_refused(main, settings, capsys):
    assert main(settings) == 0
    final, (first, second) = Path(settings["OUTPUT_DIR"], "final"), settings["REWARDS"]
    for rewards, said in (
        ([first | {"WEIGHT": 3.0}, second], "REWARDS.0.WEIGHT was 1.0 and is 3.0 now"),
        ([first], "REWARDS was "),
    ):
        keys = {"REWARDS": rewards, "STEPS": 4, "LRATE": 5e-3, "SEED": 7}
        assert main(settings | keys | {"RESUME": "auto"}) == 2
        assert f"error: RESUME: {said}" in (error := capsys.readouterr().err.splitlines()[-1])
        assert error.endswith(
            "; LRATE was 0.001 and is 0.005 now; SEED was 0 and is 7 now. A resumed run continues "
            f"as it was. For another run, start a new one with MODEL={final} and another OUTPUT_DIR"
        )
    assert main(settings | {"RESUME": "auto", "STEPS": 4, "LOG_EVERY": 1, "$schema": "any"}) == 0


def test_a_run_of_a_version_without_a_key_goes_on_at_its_default(main, settings, tmp_path, capsys):
    settings |= {"REWARDS": [{"TYPE": "regex", "PATTERNS": "e"}], "STEPS": 2}
    assert main(settings) == 0
    file = Path(settings["OUTPUT_DIR"], "final/run_config.json")
    keys = json.loads(file.read_text())
    del keys["TOP_P"], keys["REWARDS"][0]["MATCH"]
    file.write_text(json.dumps(keys))
    manifest = file.with_name("manifest.json")
    written = json.loads(manifest.read_text())
    written["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(written))
    assert main(settings | {"RESUME": "auto", "STEPS": 3, "TOP_P": 0.9}) == 2
    assert "TOP_P was 1.0" in capsys.readouterr().err
    assert main(settings | {"RESUME": "auto", "STEPS": 3}) == 0
