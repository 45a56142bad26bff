"""The arrows between the parts: who may import whom, and that importing does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

WINGS = ["adaptiverl/optim", "adaptiverl/rl", "adaptiverl/run", "rewards"]


def imports(file: Path) -> set[str]:
    """Every module the file names, those imported inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("wing", WINGS)
def test_wings_do_not_know_each_other(wing):
    own = wing.replace("/", ".")
    files = sorted((ROOT / wing).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            ours = name.split(".")[0] in ("adaptiverl", "rewards", "train")
            assert not ours or name.startswith(f"{own}."), f"{file.relative_to(ROOT)}: {name}"


def test_optim_needs_only_torch():
    """bitsandbytes and safetensors only for who asks for what needs them."""
    allowed = {"torch", "bitsandbytes", "safetensors", "adaptiverl", *sys.stdlib_module_names}
    for file in (ROOT / "adaptiverl/optim").rglob("*.py"):
        assert {name.split(".")[0] for name in imports(file)} <= allowed


def test_importing_loads_nothing_heavy_and_reads_no_config():
    """A model, peft, bitsandbytes and sentence-transformers load when they are asked for."""
    code = (
        "import sys, train, rewards\n"
        "heavy = {'peft', 'bitsandbytes', 'sentence_transformers', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_every_name_of_the_package_is_there():
    """They are looked up when they are used, which no import would notice."""
    import adaptiverl

    for name in adaptiverl.__all__:
        assert getattr(adaptiverl, name).__name__ == name
    assert set(adaptiverl.__all__) <= set(dir(adaptiverl))
    with pytest.raises(AttributeError, match="no attribute 'AdaptiveOptimiser'"):
        _ = adaptiverl.AdaptiveOptimiser
