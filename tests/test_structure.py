"""The arrows between the packages: who may import whom, no circles, and no work at import."""

import ast
import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

PACKAGES = ["config", "files", "integrations", "optim", "rl"]
# What joins packages
JOINING = ["training", "commands"]
OURS = ("adaptiverl", "rewards", "train")
FILES = [ROOT / "train.py", *(ROOT / "adaptiverl").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")]


def imports(file: Path) -> Iterator[str]:
    """Every module that the file names, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The module of ours that `name`, which may be a function in it, belongs to."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:size])
        if place.with_suffix(".py").exists() or (place / "__init__.py").exists():
            return ".".join(parts[:size])
    return None


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


GRAPH = {
    name_of(file): {
        found
        for name in imports(file)
        if name.split(".")[0] in OURS and (found := module_of(name)) and found != name_of(file)
    }
    for file in FILES
}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_do_not_know_each_other(package):
    own = f"adaptiverl.{package}"
    # Adapters are for optimizers, and nothing imports adapters.
    allowed = (own, "adaptiverl.optim") if package == "integrations" else (own,)
    files = [name for name in GRAPH if name == own or name.startswith(f"{own}.")]
    assert files
    for name in files:
        for found in GRAPH[name]:
            assert found.startswith(allowed), f"{name} imports {found}"


def test_rewards_know_nothing_of_the_program():
    for name, found in GRAPH.items():
        if name.split(".")[0] == "rewards":
            assert all(each.split(".")[0] == "rewards" for each in found), name


def test_only_what_joins_packages_is_joined_by_the_program():
    """Whoever imports two packages is train.py, training/ or commands/; nothing imports those."""
    joining = (*(f"adaptiverl.{each}" for each in JOINING), "adaptiverl.__main__", "train")
    for name, found in GRAPH.items():
        if not name.startswith(joining):
            assert not any(each.startswith(joining) for each in found), name


def test_there_is_no_circle():
    """Also not one that only type checkers see."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name not in done:
            for found in GRAPH[name]:
                # A package's own __init__ names its parts: `from adaptiverl.optim.online import …`
                if not name.startswith(f"{found}."):
                    visit(found, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_no_class_has_more_than_twelve_public_methods():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                own = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                public = [each.name for each in own if not each.name.startswith("_")]
                assert len(public) <= 12, f"{file.relative_to(ROOT)}: {node.name}: {public}"


def test_optim_needs_only_torch():
    """bitsandbytes and safetensors only for who asks for what needs them."""
    allowed = {"torch", "bitsandbytes", "safetensors", "adaptiverl", *sys.stdlib_module_names}
    for file in (ROOT / "adaptiverl/optim").rglob("*.py"):
        assert {name.split(".")[0] for name in imports(file)} <= allowed


def run(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


EVERYTHING = """
import sys, adaptiverl, rewards, train, adaptiverl.__main__
[getattr(adaptiverl, name) for name in adaptiverl.__all__]
print({*sys.argv[1:]} & {*sys.modules})
"""


@pytest.mark.parametrize(
    "modules",
    [
        ("peft", "bitsandbytes", "sentence_transformers", "trl"),
        ("openai", "fastapi", "uvicorn", "tensorboard", "keras", "optax", "jax"),  # of the extras
    ],
    ids=["heavy", "extras"],
)
def test_importing_everything_loads_nothing_that_is_not_asked_for(warm, tmp_path, modules):
    """Nor reads a config. What is forked has imported train.py, and nothing else of ours."""
    script = tmp_path / "everything.py"
    script.write_text(EVERYTHING)
    process = warm.start([sys.executable, str(script), *modules], ENVIRONMENT)
    assert process.communicate(timeout=60) == ("set()\n", "")


def test_what_a_config_may_say_is_known_without_torch():
    run(
        "import sys, adaptiverl.commands.arguments\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_every_name_of_the_package_is_there():
    """They are looked up when they are used, which no import would notice."""
    import adaptiverl

    for name in adaptiverl.__all__:
        assert getattr(adaptiverl, name).__name__ == name
    assert set(adaptiverl.__all__) <= set(dir(adaptiverl))
    with pytest.raises(AttributeError, match="no attribute 'AdaptiveOptimiser'"):
        _ = adaptiverl.AdaptiveOptimiser


def patched(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and target of each patch of what was imported from us: by setattr or by `=`."""
    ours = set(OURS)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            ours |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = {alias.asname: alias.name for alias in node.names if alias.asname}
            ours |= {short for short, name in names.items() if name.split(".")[0] in OURS}
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            targets = node.args[:1] if name in ("setattr", "delattr", "setitem") else []
        elif isinstance(node, ast.Assign):
            targets = [each for each in node.targets if isinstance(each, ast.Attribute)]
        for target in targets:
            text = ast.unparse(target).strip("'\"")
            if text.split(".")[0] in ours:
                yield node.lineno, text


def scripts(tree: ast.AST) -> Iterator[ast.AST]:
    """The programs that a test writes down as text: templates of str.format."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = re.sub(r"\{\w+!r\}", "''", node.value).replace("{{", "{").replace("}}", "}")
            if "import " in text:
                with contextlib.suppress(SyntaxError):  # prose
                    yield ast.parse(text)


def test_tests_and_benchmarks_patch_no_name_of_the_program():
    """They build its parts and pass others; patched are only libraries and environment."""
    files = {*(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")}
    for file in files - {Path(__file__)}:  # which shows below what a patch is
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for each in (tree, *scripts(tree)):
            for line, target in patched(each):
                raise AssertionError(f"{file.relative_to(ROOT)}:{line}: {target}")


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import train\nmonkeypatch.setattr(train, 'run', 3)", "train"),
        ("monkeypatch.setattr('adaptiverl.files.logs.RunLog', 3)", "adaptiverl.files.logs.RunLog"),
        ("from adaptiverl.rl import policy as p\np.Policy.save = 3", "p.Policy.save"),
        ("import adaptiverl.rl.policy as p\nsetattr(p, 'x', 3)", "p"),
        ("import torch\nmonkeypatch.setattr(torch, 'mm', 3)", None),
        ("import os\nos.fsync = 3", None),
    ],
)
def test_what_is_a_patch(code, found):
    assert [target for _, target in patched(ast.parse(code))] == [found] * bool(found)
    template = ast.parse(f"X = {'import sys; sys.path[:] = [{root!r}]; {{}}' + chr(10) + code!r}")
    (script,) = scripts(template)
    assert [target for _, target in patched(script)] == [found] * bool(found)


def shadowing(code: str) -> set[str]:
    """Names of the module that a comprehension in it takes for its variable."""
    tree = ast.parse(code)
    top = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            top |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = [node.target for node in ast.walk(tree) if isinstance(node, ast.comprehension)]
    return top & {x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)}


def test_comprehensions_hide_no_name_of_their_module():
    """Python 3.12 then takes the name for a local one in the comprehensions after it."""
    code = "def number(x): ...\ndef f(d):\n    return [number for number in d]"
    assert shadowing(code) == {"number"}
    found = {file.name: shadowing(file.read_text(encoding="utf-8")) for file in FILES}
    assert {name: names for name, names in found.items() if names} == {}


def test_no_two_files_of_tests_write_a_module_of_rewards_of_one_name():
    """A process imports it once: the second test would be given the first one's rewards."""
    found: dict[str, Path] = {}
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        for name in set(re.findall(r'"FUNCTION": f?"(\w+):', file.read_text(encoding="utf-8"))):
            is_written = f'"{name}.py"' in file.read_text(encoding="utf-8")
            assert not is_written or found.setdefault(name, file) == file, f"{name} of {file.name}"
