"""What may be left out of an installation: the extras, and what is said where one is missing."""

import re
import sys
import tomllib

import pytest
from conftest import ROOT

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
