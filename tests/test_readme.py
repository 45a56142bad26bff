"""README.md is true: tables are those of the declarations, commands run, links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl

from adaptiverl.commands.keys import default_text
from adaptiverl.config.loading import load_config
from adaptiverl.training.keys import RunConfig
from rewards import REWARD_TYPES, Reward
from rewards.__main__ import with_table

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python train\.py (.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


def test_the_table_of_common_keys_has_their_defaults_and_meanings():
    rows = re.findall(r"^\| `([A-Z_0-9]+)` \| `(.*?)` \| (.*) \|$", README, flags=re.MULTILINE)
    assert len(rows) == len({key for key, _, _ in rows}) == 12
    for key, default, meaning in rows:
        field = RunConfig.model_fields[key]
        assert default == default_text(field), key
        assert field.description and meaning.startswith(field.description), key


def test_the_rewards_table_is_that_of_the_declarations():
    assert with_table(README) == README, "run `python -m rewards`"
    for kind in REWARD_TYPES:
        name = kind.model_fields["type"].default
        row = re.search(rf"^\| `{name}` \|(.*)$", README, flags=re.MULTILINE)
        for key in kind.model_fields.keys() - Reward.model_fields.keys():
            assert row and f"`{key.upper()}`" in row.group(1), f"{name}: {key}"


def test_files_it_links_to_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_command_has_a_valid_config():
    assert len(COMMANDS) >= 4
    for command in COMMANDS:
        path, *rest = shlex.split(command)
        load_config(ROOT / path, [word for word in rest if word != "--dry-run"], schema=RunConfig)


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


@pytest.mark.parametrize("blocks", [(2,), (2, 3), (4,)])
def test_the_optimizers_lines_run(blocks):
    """The third one takes its imports from the second."""
    import torch

    model, inputs = torch.nn.Linear(2, 3), torch.randn(4, 2)
    namespace = {"model": model, "inputs": inputs, "AdamW": torch.optim.AdamW}
    for block in blocks:
        namespace["loss"] = -model(inputs).log_softmax(-1)[:, 0].mean()
        before = model.weight.detach().clone()
        exec(README.split("```python")[block].split("```")[0], namespace)
        assert not torch.equal(before, model.weight)
    if 3 in blocks:
        assert namespace["optimizer"].info.kl < 0.01, "from a rate of 1"


@pytest.mark.parametrize("target", ["train", "test"])
def test_make_has_the_two_commands(target):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert f"make {target}" in README
