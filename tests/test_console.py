"""The console: what models and servers write steers no terminal, and lines stand on their own."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest
from conftest import read_jsonl
from tqdm import tqdm

from adaptiverl.files.console import Console, printable
from adaptiverl.training.metrics import cell

WIPE = "\x1b[2J\x1b]0;owned\x07"  # clears the screen and renames the window


def test_what_steers_a_terminal_is_not_printed():
    assert printable(f"a\tb\n{WIPE}é") == "a\tb\n�[2J�]0;owned�é"
    assert printable("\u202eabc\x9b1m") == "�abc�1m"


def test_a_dry_run_shows_texts_without_what_steers_a_terminal(settings, main, capsys, tmp_path):
    Path(settings["TRAIN_FILE"]).write_text(json.dumps([{"prompt": f"hi{WIPE}"}]))
    assert main(settings, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "hi�[2J�]0;owned�" in out and "\x1b" not in out
    assert cell(WIPE) == "�[2J�]0;owned�"


def test_a_dry_run_weighs_rewards_as_the_first_step_does(settings, main, capsys):
    rewards = [
        {"TYPE": "length", "TARGET": 6, "WEIGHT": [[0, 0.0], [2, 1.0]]},
        {"TYPE": "regex", "PATTERNS": "th", "NORMALIZE": "zscore", "WEIGHT": 0.25},
    ]
    keys = settings | {"REWARDS": rewards}
    assert main(keys, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [float(line.split()[-1]) for line in lines[1:9]]
    assert main(keys | {"STEPS": 1}) == 0
    rows = read_jsonl(Path(settings["OUTPUT_DIR"]) / "samples.jsonl")
    assert shown == pytest.approx([row["reward"] for row in rows], abs=5e-4)
    assert len(set(shown)) > 1


def test_nor_does_what_a_reward_raises(settings, main, capfd, tmp_path, monkeypatch):
    """Its message holds what the model wrote, often."""
    (tmp_path / "strict.py").write_text(
        f"def strict(completions, **_):\n    raise ValueError({WIPE!r} + completions[0])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    keys = settings | {"REWARDS": [{"TYPE": "python", "FUNCTION": "strict:strict"}]}
    for arguments in ((), ("--dry-run",)):
        assert main(keys, *arguments) == 3
        err = capfd.readouterr().err
        assert "�[2J�]0;owned�" in err and "\x1b" not in err


def test_a_warning_stands_on_a_line_of_its_own(capsys):
    log = logging.Logger("a run's")
    log.addHandler(Console())
    with tqdm(total=3, file=sys.stderr):
        log.warning("something odd: %s", WIPE)
        err = capsys.readouterr().err
    assert "something odd: �[2J�]0;owned�" in re.split(r"[\r\n]", err)
