"""The wheel, installed into an empty environment, trains in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, read_jsonl

from adaptiverl.training.keys import RunConfig


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of an environment that has the wheel; its dependencies are this one's."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    source = folder / "source"  # a build leaves files beside what it builds
    for name in ("adaptiverl", "rewards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([*build, str(source)], check=True, cwd=folder)
    (wheel,) = folder.glob("adaptiverl-*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env/bin/python"
    subprocess.run(
        [*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, cwd=folder
    )
    packages = next((folder / "env").glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.fixture
def command(installed, tmp_path):
    """Runs a program of that environment in an empty folder that holds prompts and a config."""
    prompts = [{"prompt": "This film"}, {"prompt": "I saw it"}]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    keys = {"TRAIN_FILE": "prompts.json", "BATCH_SIZE": 4, "MAX_NEW_TOKENS": 8, "OUTPUT_DIR": "run"}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [installed / words[0], *words[1:]],
            cwd=tmp_path,
            env=environment | {"PATH": f"{installed}{os.pathsep}{os.environ['PATH']}"},
            text=True,
            capture_output=True,
            timeout=300,
        )

    return run


@pytest.fixture
def of_the_user(tmp_path) -> str:
    """Rewards: that of the package, and one of the folder, in which are modules named as ours."""
    for name in ("train", "rewards"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('of the user')\n")
    (tmp_path / "mine.py").write_text(
        "def short(completions, **columns):\n    return [-len(text) for text in completions]\n"
    )
    (packaged,) = RunConfig().model_dump(by_alias=True, mode="json")["REWARDS"]
    return f"REWARDS={json.dumps([packaged, {'TYPE': 'python', 'FUNCTION': 'mine:short'}])}"


def test_it_trains_and_explains_with_what_comes_in_the_package(command, of_the_user, tmp_path):
    """A user's train.py and rewards.py stand in the way of nothing, and FUNCTION finds theirs."""
    result = command("adaptiverl", "train", "config.json", "STEPS=2", of_the_user)
    assert result.returncode == 0, result.stderr
    assert "finished: 2 steps" in result.stdout
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["update_kl"] > 0
    assert rows[-1]["rewards/short/mean"] < 0 < rows[-1]["rewards/classifier/mean"]
    explained = command("adaptiverl", "explain", "run")
    assert explained.returncode == 0, explained.stderr
    assert "What moved lr" in explained.stdout


def test_modules_of_the_working_directory_are_never_ours_as_a_module(
    command, of_the_user, tmp_path
):
    """`python -m` puts that folder before all others; theirs are known all the same."""
    wrong = of_the_user.replace("mine:short", "theirs:short")
    result = command("python", "-m", "adaptiverl", "train", "config.json", wrong)
    assert result.returncode == 2
    assert result.stderr == (
        "error: REWARDS.1: FUNCTION theirs:short: there is no module 'theirs' in the working "
        f"directory ({tmp_path}), and none is installed\n"
    )


def test_keys_and_schema_are_printed_without_a_run(command):
    keys = command("adaptiverl", "keys")
    assert keys.returncode == 0, keys.stderr
    assert "TRUST_REGION_KL" in keys.stdout and '"TYPE": "judge"' in keys.stdout
    schema = json.loads(command("adaptiverl", "schema").stdout)
    assert schema["properties"]["STEPS"]["default"] == 100
