"""What may be left out of an installation: the extras, and what is said where one is missing."""

import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ENVIRONMENT, ROOT

from rewards import HumanReward, JudgeReward

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=\[]", requirement)[0].strip().lower()


def pinned(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_requirements_pin_what_a_run_may_import():
    names = {*map(name_of, [*PROJECT["dependencies"], *EXTRAS["judge"], *EXTRAS["web"]])}
    assert {*map(str.lower, pinned("requirements.txt"))} == names
    assert "tensorboard" in pinned("requirements-dev.txt")
    for extra in ("keras", "optax"):
        assert not {*map(name_of, EXTRAS[extra])} & names


@pytest.mark.parametrize(
    ("module", "start", "message"),
    [
        ("openai", lambda d: JudgeReward(model="m", rubric="r").start(), "judge.*install openai"),
        ("fastapi", lambda d: HumanReward(where="web", labels=d).queue, "web.*install fastapi"),
        ("uvicorn", lambda d: HumanReward(where="web", labels=d).queue, "web.*install uvicorn"),
    ],
)
def test_a_reward_whose_extra_is_missing_says_what_to_install(
    module, start, message, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        start(str(tmp_path / "labels.sqlite"))


def test_the_package_imports_without_any_extra():
    """Also all rewards, the command line and the loop."""
    modules = ["openai", "fastapi", "uvicorn", "tensorboard", "keras", "optax", "jax"]
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({modules}))\n"
        "import adaptiverl, rewards, train, adaptiverl.__main__\n"
        "[getattr(adaptiverl, name) for name in adaptiverl.__all__]"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stderr
