"""README.md is true: its config table is complete, its commands run, its links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl

from adaptiverl.run.config import Config
from adaptiverl.run.reading import load_config
from adaptiverl.run.reward_config import REWARD_KINDS, Reward

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python train\.py (.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


def test_the_config_table_lists_every_key_with_its_default():
    rows = dict(re.findall(r"^\| `([A-Z_0-9]+)` \| (.*?) \|", README, flags=re.MULTILINE))
    for name, field in Config.model_fields.items():
        if name in ("SCHEMA", "REWARDS"):
            continue
        assert rows[name] == f"`{json.dumps(field.default)}`", name
    assert rows.keys() - {"REWARDS"} == Config.model_fields.keys() - {"SCHEMA", "REWARDS"}


def test_the_rewards_table_lists_every_key_of_every_reward():
    for kind in REWARD_KINDS:
        name = kind.model_fields["TYPE"].annotation.__args__[0]
        row = re.search(rf"^\| `{name}` \|(.*)$", README, flags=re.MULTILINE)
        for key in kind.model_fields.keys() - {"TYPE"} - Reward.model_fields.keys():
            assert row and f"`{key}`" in row.group(1), f"{name}: {key}"


def test_files_it_links_to_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_command_has_a_valid_config():
    assert len(COMMANDS) >= 4
    for command in COMMANDS:
        path, *rest = shlex.split(command)
        load_config(ROOT / path, [word for word in rest if word != "--dry-run"])


def test_the_commands_to_try_run_as_written(tmp_path, monkeypatch, capsys):
    """Those of the second block, in order, in this process, in a folder of their own."""
    from accelerate.state import AcceleratorState

    import train

    monkeypatch.chdir(ROOT)
    block = README.split("```bash")[2].split("```")[0]
    for line in block.strip().splitlines():
        words = shlex.split(line, comments=True)
        assert words[:2] == ["python", "train.py"]
        monkeypatch.setattr("sys.argv", [*words[1:], f"OUTPUT_DIR={tmp_path / 'run'}"])
        AcceleratorState._reset_state(reset_partial_state=True)
        assert train.main() == 0, line
    assert "trainable parameters" in capsys.readouterr().out
    steps = [row["step"] for row in read_jsonl(Path(tmp_path) / "run" / "metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] > 1


def test_the_example_in_python_gives_what_its_comment_says():
    *code, last = README.split("```python")[1].split("```")[0].strip().splitlines()
    call, comment = last.split("  # ")
    namespace: dict = {}
    exec("\n".join([*code, f"result = {call}"]), namespace)
    assert namespace["result"] == json.loads(comment)


@pytest.mark.parametrize("block", [2, 3])
def test_the_optimizers_lines_run(block):
    import torch

    model = torch.nn.Linear(2, 1)
    loss = model(torch.ones(2)).sum()
    namespace = {"model": model, "loss": loss, "AdamW": torch.optim.AdamW}
    before = model.weight.detach().clone()
    exec(README.split("```python")[block].split("```")[0], namespace)
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize("target", ["train", "test"])
def test_make_has_the_two_commands(target):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert f"make {target}" in README
