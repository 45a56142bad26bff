"""What is not ours may fail or misbehave: the console, the disk, a reward's code and its texts."""

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, read_jsonl

from adaptiverl.__main__ import main as adaptiverl
from adaptiverl.files import room
from adaptiverl.files.console import forgiving_console
from rewards import CompositeReward

NUMBERS = count()  # a module is imported once


@pytest.fixture
def rewards_file(tmp_path, monkeypatch) -> Callable[..., list[dict]]:
    """Writes a module of rewards; the entries of REWARDS for those of its functions."""

    def write(code: str, *names: str) -> list[dict]:
        module = f"foreign_{next(NUMBERS)}"
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        return [{"TYPE": "python", "FUNCTION": f"{module}:{name}"} for name in names]

    return write


def out_of(settings: dict) -> Path:
    return Path(settings["OUTPUT_DIR"])


# The console


PATIENT = """
def patient(completions, trainer_state, **columns):
    if trainer_state.global_step == 2:
        with open({fifo!r}) as file:
            file.readline()
    return [float(len(text)) for text in completions]
"""


@pytest.mark.skipif(os.name == "nt", reason="pipes that have names are of POSIX")
def test_a_run_goes_on_when_nobody_reads_its_output(
    start, settings, rewards_file, tmp_path, monkeypatch
):
    """From its second step on, which waits until nobody reads."""
    os.mkfifo(tmp_path / "closed")
    rewards = rewards_file(PATIENT.format(fifo=str(tmp_path / "closed")), "patient")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    process = start(settings | {"REWARDS": rewards, "STEPS": 5, "LOG_EVERY": 1})
    line = process.stdout.readline()
    assert line.startswith("Step 1/5"), process.stderr.read()
    process.stdout.close()  # as `| head -1` does
    closed = os.open(tmp_path / "closed", os.O_RDWR)
    os.write(closed, b"\n")
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(timeout=120) == 0
    os.close(closed)
    said = "stdout cannot be written to: the run goes on, and its folder has everything\n"
    assert err.count(said) == 1 and "Traceback" not in err
    assert len(read_jsonl(out_of(settings) / "metrics.jsonl")) == 5
    assert (out_of(settings) / "final/model.safetensors").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_commands_end_quietly_where_their_output_cannot_be_written():
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "adaptiverl", "keys"],
            cwd=ROOT, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_terminal_without_unicode_gets_question_marks(main, settings, monkeypatch):
    assert main(settings) == 0
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert adaptiverl(["keys"]) == 0
    assert adaptiverl(["explain", settings["OUTPUT_DIR"]]) == 0
    assert sys.stdout is console, "as it was"
    text = console.buffer.getvalue().decode("ascii")
    assert "TRUST_REGION_KL" in text and "? 0." in text  # ±


def test_what_cannot_be_written_is_dropped_from_then_on(tmp_path, capfd):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        before, sys.stdout = sys.stdout, pipe
        try:
            with forgiving_console("nobody reads"):
                for _ in range(3):
                    print("a line", flush=True)
        finally:
            sys.stdout = before
    assert capfd.readouterr().err == "nobody reads\n"


@pytest.mark.parametrize("missing", ["stdout", "stderr", "stdin"])
def test_a_stream_that_is_not_there_changes_no_exit_status(
    main, settings, monkeypatch, capfd, missing, tmp_path
):
    """As Python has it where it is started with `>&-`, `2>&-` or `<&-`."""
    monkeypatch.setattr(sys, missing, None)
    assert main(settings | {"SAVE_EVERY": 1}) == 0
    out = out_of(settings)
    assert (out / "step-000001/manifest.json").exists()
    assert (out / "final/model.safetensors").exists()
    said = "stdout cannot be written to: the run goes on, and its folder has everything\n"
    assert capfd.readouterr().err == (said if missing == "stdout" else "")
    assert main(settings, "--dry-run") == 0
    page = str(tmp_path / "page.html")
    assert adaptiverl(["explain", str(out)]) == 0
    assert adaptiverl(["report", str(out), "--out", page]) == 0 and Path(page).exists()
    assert adaptiverl(["export", str(out), str(tmp_path / "model")]) == 0
    assert adaptiverl(["explain", str(tmp_path)]) == 2
    if missing == "stdin":
        capfd.readouterr()
        assert adaptiverl(["generate", str(out)]) == 2
        want = "error: there is no prompt, or an empty one: give text to complete\n"
        assert capfd.readouterr().err == want
    assert getattr(sys, missing) is None, "as it was"


# The disk


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_full_disk_is_told_in_a_line(run, settings, tmp_path):
    small = tmp_path / "small.py"
    small.write_text(
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "sys.exit(train.main())\n"
    )
    result = run(settings | {"REPORT": False}, program=str(small))
    assert result.returncode == 3 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == (
        f"error: {out_of(settings).resolve() / 'final'} could not be written: File too large. "
        "Raise the limit on the size of a file: that of `ulimit -f`, or of the file system; there "
        "is no checkpoint, so the run starts anew"
    )


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_full_disk_with_a_checkpoint_names_it(main, settings, capsys):
    import resource

    keys = settings | {"REPORT": False, "RESUME": "auto"}
    assert main(keys | {"STEPS": 1}) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        assert main(keys | {"STEPS": 2}) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"; RESUME=auto goes on from {out_of(settings) / 'final'}")
    assert main(keys | {"STEPS": 2}) == 0


@pytest.mark.parametrize(
    ("raised", "why", "remedy"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device", "Make room"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded", "Make room"),
        (
            RuntimeError("I/O error: File too large (os error 27)"),
            "File too large",
            "Raise the limit on the size of a file: that of `ulimit -f`, or of the file system",
        ),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0"),
            "PytorchStreamWriter failed writing file data/0",
            "Make room, or raise the limit on the size of a file: that of `ulimit -f`, or of the "
            "file system",
        ),
    ],
)
def test_an_error_of_a_full_disk_says_which_file_why_and_what_to_do(raised, why, remedy):
    with pytest.raises(OSError) as caught, room.naming(Path("a/b")):
        raise raised
    assert str(caught.value) == f"a/b could not be written: {why}"
    assert room.remedy(caught.value) == remedy
    with pytest.raises(OSError, match=r"^.Errno 2. x$") as caught, room.naming(Path("a/b")):
        raise OSError(errno.ENOENT, "x")
    assert room.cause(caught.value) is None


def test_a_name_that_is_too_long(main, settings, tmp_path, capsys):
    assert main(settings | {"OUTPUT_DIR": str(tmp_path / ("x" * 300))}) == 2
    assert "error: OUTPUT_DIR: " in capsys.readouterr().err


# A reward's code


ENDS = """
import asyncio, sys

def interrupts(prompts, completions, trainer_state=None, **columns):
    if trainer_state.global_step == 2:
        raise KeyboardInterrupt
    return [float(len(text)) for text in completions]

def leaves(prompts, completions, trainer_state=None, **columns):
    if trainer_state.global_step == 2:
        sys.exit(0)
    return [float(len(text)) for text in completions]

async def cancels(prompts, completions, trainer_state=None, **columns):
    if trainer_state.global_step == 2:
        raise asyncio.CancelledError()
    return [float(len(text)) for text in completions]

def stops(prompts, completions, trainer_state=None, **columns):
    if trainer_state.global_step == 2:
        next(iter([]))
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("leaves", "RuntimeError: it raised SystemExit(0)"),
        ("cancels", "RuntimeError: it raised CancelledError()"),
        ("stops", "RuntimeError: it raised StopIteration()"),
        ("interrupts", "RuntimeError: it raised KeyboardInterrupt()"),
    ],
)
def test_a_reward_that_would_end_the_program_pauses_the_run(
    main, settings, rewards_file, capsys, name, error
):
    assert main(settings | {"REWARDS": rewards_file(ENDS, name)}) == 3
    out = out_of(settings)
    assert f"paused before step 2: reward '{name}' failed ({error})" in capsys.readouterr().err
    assert (out / "step-000001/manifest.json").exists()
    assert read_jsonl(out / "events.jsonl")[-1]["kind"] == "paused"


def test_where_ctrl_c_interrupts_a_reward_does_not_hide_it():
    def mine(completions, **columns):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            CompositeReward({"mine": mine})(["a"], ["b"])
    finally:
        signal.signal(signal.SIGINT, before)


FORKS = """
import os

def mine(completions, trainer_state, **columns):
    if (child := os.fork()) == 0:
        {leaves}
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [float(status + i) for i in range(len(completions))]

async def later(**given):
    return mine(**given)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is of POSIX")
@pytest.mark.parametrize("name", ["mine", "later"])
@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        ("raise SystemExit(0)", "raised SystemExit(0)"),
        ("raise ValueError('odd')", "raised ValueError(odd)"),
        ("return [0.0] * len(completions)", "returned"),
    ],
)
def test_a_forked_process_that_leaves_a_reward_is_not_the_run(
    run, settings, rewards_file, tmp_path, monkeypatch, name, leaves, said
):
    rewards = rewards_file(FORKS.format(leaves=leaves), name)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    result = run(settings | {"REWARDS": rewards, "STEPS": 1})
    assert result.returncode == 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("reward ")]
    wanted = f"reward {name!r}: a process that it forked {said} and is ended; use os._exit there"
    assert line == wanted
    assert [row["reward"] for row in read_jsonl(out_of(settings) / "metrics.jsonl")] == [1 + 3.5]
    assert not (out_of(settings) / "events.jsonl").exists()


@pytest.mark.skipif(os.name == "nt", reason="pipes that have names are of POSIX")
@pytest.mark.parametrize("save_every", [0, 1])
def test_ctrl_c_in_a_reward_is_answered_at_once_and_a_second_one_obeyed(
    start, settings, rewards_file, tmp_path, monkeypatch, save_every
):
    os.mkfifo(fifo := tmp_path / "wait")
    rewards = rewards_file(PATIENT.format(fifo=str(fifo)), "patient")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    process = start(settings | {"REWARDS": rewards, "SAVE_EVERY": save_every})
    with process.stdout, process.stderr, fifo.open("w"):  # returns when the reward of step 2 reads
        process.send_signal(signal.SIGINT)
        then = "there is no checkpoint yet"
        if save_every:
            then = f"RESUME=auto goes on from {out_of(settings) / 'step-000001'}"
        assert process.stderr.readline() == (
            "stopping: saves as soon as this step ends. A second signal ends the run at once, "
            f"unsaved; {then}\n"
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT


def test_a_reward_that_fails_leaves_the_other_coroutines_in_peace(
    main, settings, rewards_file, capsys
):
    code = ENDS + "\nasync def waits(prompts, completions, **columns):\n"
    code += "    await asyncio.sleep(0.2)\n    return [0.0] * len(prompts)\n"
    assert main(settings | {"REWARDS": rewards_file(code, "waits", "cancels")}) == 3
    err = capsys.readouterr().err
    assert "reward 'cancels' failed (RuntimeError: it raised CancelledError())" in err
    assert "waits" not in err and "unhandled" not in err


def test_a_reward_cannot_change_what_others_see():
    said = [{"role": "user", "content": "hi"}]
    seen = []

    def spoils(prompts, completions, tags, **columns):
        prompts[0].append({"role": "assistant", "content": "invented"})
        completions[0][0]["content"] = ""
        tags.clear()
        return [0.0]

    def sees(prompts, completions, tags, **columns):
        seen.append((prompts, completions, tags))
        return [1.0]

    async def sees_too(prompts, completions, tags, **columns):
        return sees(prompts, completions, tags)

    answer = [[{"role": "assistant", "content": "hello"}]]
    composite = CompositeReward({"spoils": spoils, "sees": sees, "sees too": sees_too})
    composite([said], answer, tags=["a"])
    assert seen == [([said], answer, ["a"])] * 2
    assert said == [{"role": "user", "content": "hi"}]


def test_settings_of_torch_that_a_reward_makes_are_its_own(main, settings, rewards_file):
    code = (
        "import torch\n"
        "torch.set_grad_enabled(False)\n"
        "def mine(prompts, completions, **columns):\n"
        "    torch.set_grad_enabled(False)\n"
        "    torch.set_default_dtype(torch.float64)\n"
        "    return [float(text.count('e')) for text in completions]\n"
    )
    assert main(settings | {"REWARDS": rewards_file(code, "mine")}) == 0
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    rows = read_jsonl(out_of(settings) / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_streams_that_a_reward_replaces_are_put_back(main, settings, rewards_file, capsys, stream):
    code = (
        "import asyncio, io, sys\n"
        "def mine(completions, **columns):\n"
        f"    sys.{stream} = io.StringIO()\n"
        "    return [float(text.count('e')) for text in completions]\n"
        "async def later(completions, **columns):\n"
        "    await asyncio.sleep(0)\n"
        f"    sys.{stream} = None\n"
        "    return [0.0] * len(completions)\n"
    )
    before = getattr(sys, stream)
    rewards = rewards_file(code, "mine", "later")
    assert main(settings | {"STEPS": 2, "REWARDS": rewards}) == 0
    assert getattr(sys, stream) is before
    said, _ = capsys.readouterr()
    assert said.count("Step ") == 2 and "finished: 2 steps" in said


def test_a_stream_that_a_reward_closes_is_written_to_no_more(
    main, settings, rewards_file, tmp_path, monkeypatch, capsys
):
    code = (
        "import sys\n"
        "def mine(completions, **columns):\n"
        "    sys.stdout.close()\n"
        "    return [float(text.count('e')) for text in completions]\n"
    )
    with (tmp_path / "said").open("w") as own:
        monkeypatch.setattr(sys, "stdout", own)
        assert main(settings | {"STEPS": 2, "REWARDS": rewards_file(code, "mine")}) == 0
    said = "stdout cannot be written to: the run goes on, and its folder has everything\n"
    assert capsys.readouterr().err.count(said) == 1
    assert (out_of(settings) / "final/model.safetensors").exists()


@pytest.mark.parametrize("where", ["when imported", "when called"])
def test_a_reward_that_changes_the_working_directory_moves_no_file(
    main, settings, rewards_file, tmp_path, monkeypatch, capsys, where
):
    (tmp_path / "else").mkdir()
    moves = f"os.chdir({str(tmp_path / 'else')!r})"
    code = "import os\n" + (moves if where == "when imported" else "")
    code += f"\ndef count(completions, **_):\n    {moves}\n    return list(map(len, completions))\n"
    monkeypatch.chdir(tmp_path)
    keys = {"OUTPUT_DIR": "here/run", "STEPS": 2, "REWARDS": rewards_file(code, "count")}
    assert main(settings | keys) == 0
    assert sorted(path.name for path in (tmp_path / "here/run").iterdir()) == [
        ".lock", "config.json", "controller.jsonl", "environment.jsonl", "final", "metrics.jsonl",
        "progress.jsonl", "report.html", "samples.jsonl",
    ]  # fmt: skip
    assert not any((tmp_path / "else").iterdir())
    assert "finished: 2 steps, the model is in here/run/final\n" in capsys.readouterr().out


def test_a_column_that_no_function_can_take(main, settings, capsys):
    file = Path(settings["TRAIN_FILE"])
    file.write_text(json.dumps([{"prompt": "a", "self": "b"}]))
    assert main(settings) == 2
    want = f"error: REWARDS.0: {file} has a column self: no reward can take that name\n"
    assert capsys.readouterr().err == want


# Texts that are not text


def test_half_a_character_is_written_as_its_escape(main, settings, rewards_file, capsys):
    code = (
        "def mine(prompts, completions, log_extra, trainer_state, **columns):\n"
        "    if trainer_state.global_step == 2:\n"
        "        raise ValueError('\\udcff is no text')\n"
        "    log_extra('note', ['\\ud83d half'] * len(completions))\n"
        "    return [float(text.count('e')) for text in completions]\n"
    )
    logging.disable(logging.CRITICAL)  # pytest-xdist cannot send such a text to its main process
    try:
        assert main(settings | {"REWARDS": rewards_file(code, "mine")}) == 3
    finally:
        logging.disable(logging.NOTSET)
    out = out_of(settings)
    assert "\ufffd is no text" in capsys.readouterr().err
    assert {row["note"] for row in read_jsonl(out / "samples.jsonl")} == {"\ud83d half"}
    assert "\udcff is no text" in read_jsonl(out / "events.jsonl")[-1]["message"]


def test_half_a_character_in_a_key_is_refused(main, settings, capsys):
    assert main(settings, "OUTPUT_DIR=/tmp/\udcff") == 2
    want = "error: the command line: OUTPUT_DIR is not UTF-8: surrogates not allowed\n"
    assert capsys.readouterr().err == want
