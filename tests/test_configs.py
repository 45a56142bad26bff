"""The recipes in configs/ are valid: for this program, and for accelerate."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT

from adaptiverl.config.loading import load_config
from adaptiverl.training.keys import RunConfig

RECIPES = sorted((ROOT / "configs").glob("*.json"))
LAUNCHES = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_have_no_unknown_or_contradicting_keys(path):
    config = load_config(path, schema=RunConfig)
    assert f"checkpoints/{path.stem}" == config.OUTPUT_DIR


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.name)
def test_accelerate_reads_what_is_meant(path):
    launch = load_config_from_file(str(path))
    assert launch.num_processes == int(re.match(r"\d+", path.name)[0])
    assert path.name in path.read_text().splitlines()[0], "says how it is used"
    sharded = "fsdp" in path.name
    assert launch.distributed_type.value == (
        "FSDP" if sharded else "NO" if launch.num_processes == 1 else "MULTI_GPU"
    )
    if sharded:
        assert launch.fsdp_config == yaml.safe_load(path.read_text())["fsdp_config"]
        assert launch.fsdp_config["fsdp_version"] == 2
    for recipe in re.findall(r"configs/\w+\.json", path.read_text()):
        assert (ROOT / recipe).exists()
    for recipe in RECIPES:
        keys = load_config(recipe, schema=RunConfig)
        if path.name in recipe.read_text():
            prompts = keys.BATCH_SIZE // keys.NUM_GENERATIONS
            assert prompts % launch.num_processes == 0


def small(folder: Path) -> list[str]:
    return ["BATCH_SIZE=8", "MAX_NEW_TOKENS=8", f"OUTPUT_DIR={folder}"]


def test_a_recipe_runs_from_the_command_line(run, tmp_path):
    """With the embedded models: a dry run and ten steps."""
    path = ROOT / "configs/sentiment.json"
    dry = run(path, "--dry-run", *small(tmp_path))
    assert dry.returncode == 0, dry.stderr
    result = run(path, "STEPS=10", *small(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "finished: 10 steps" in result.stdout


@pytest.mark.parametrize("name", ["toxicity", "helpfulness"])
def test_recipes_that_need_no_network_run(name, main, tmp_path, capsys):
    path = ROOT / f"configs/{name}.json"
    assert main(path, "--dry-run", *small(tmp_path)) == 0
    assert main(path, "STEPS=10", *small(tmp_path)) == 0
    assert "finished: 10 steps" in capsys.readouterr().out
