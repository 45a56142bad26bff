"""What Windows and macOS would stumble over is not in the code, as far as it can be read off."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from rewards import HumanReward

FILES = [
    path
    for place in ("adaptiverl", "rewards", "examples", "train.py")
    for path in ([ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py")))
]
POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
ABSENT = {
    ("os", name) for name in ("fork", "forkpty", "getpgid", "killpg", "mkfifo", "setsid", "uname")
} | {("signal", name) for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "alarm", "pthread_kill")}
PLACES = {"read_text": 0, "write_text": 1}  # of the encoding among the arguments


def problems(tree: ast.Module) -> Iterator[str]:
    """What Windows does not have, and text whose encoding depends on the system."""
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        yield from (f"imports {name}" for name in names if name in POSIX)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in ABSENT:
                yield f"uses {module}.{name}"
            case ast.Constant(value=str(text)) if text.startswith(("/tmp", "/proc", "/dev/")):
                yield f"names {text}"
            case ast.Call(func=ast.Attribute(attr=name), args=args, keywords=keys):
                encoded = any(key.arg == "encoding" for key in keys)
                if name in PLACES and not encoded and len(args) <= PLACES[name]:
                    yield f"{name} without an encoding"
                modes = [arg.value for arg in args if isinstance(arg, ast.Constant)]
                if name == "open" and modes and not encoded and "b" not in str(modes[0]):
                    yield "open without an encoding"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_needs_posix(path):
    found = {*problems(ast.parse(path.read_text(encoding="utf-8")))}
    if path.name == "terminal.py":  # imported only where there is termios
        assert found == {"imports termios", "imports tty", "names /dev/tty"}
    else:
        assert not found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import fcntl", ["imports fcntl"]),
        ("def f():\n    import resource", []),
        ("import os\nos.killpg(1, 2)", ["uses os.killpg"]),
        ("Path('/proc/self')", ["names /proc/self"]),
        ("p.read_text()", ["read_text without an encoding"]),
        ("p.write_text(x, 'utf-8'); p.read_text('utf-8'); p.open('wb')", []),
        ("p.open('w')", ["open without an encoding"]),
    ],
)
def test_what_is_found(code, expected):
    assert [*problems(ast.parse(code))] == expected


def test_a_terminal_without_termios_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "termios", None)
    with pytest.raises(ValueError, match='"WHERE": "web" needs none'):
        _ = HumanReward(labels=str(tmp_path / "labels.sqlite")).queue


def test_names_in_a_manifest_are_those_of_every_system(tmp_path):
    from adaptiverl.files import checkpoint
    from adaptiverl.files.manifest import MANIFEST

    def write(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep/file").write_text("x", encoding="utf-8")

    checkpoint.save(tmp_path / "step-1", 1, write)
    text = (tmp_path / "step-1" / MANIFEST).read_text("utf-8")
    assert '"deep/file"' in text and checkpoint.newest(tmp_path) == (tmp_path / "step-1", 1)
