"""A forked process is what a fresh one would be: else tests that start runs would show nothing."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, read_jsonl, without_clock


def test_a_run_is_that_of_a_fresh_interpreter(run, settings, tmp_path):
    keys = settings | {"SAVE_EVERY": 2, "LOG_EVERY": 2, "EVAL_EVERY": 3}
    said, folders = [], (tmp_path / "fresh", tmp_path / "forked")
    for out in folders:
        own = {"OUTPUT_DIR": str(out), "EVAL_SPLIT": 0.4}
        result = run(keys | own, fresh=out.name == "fresh")
        assert result.returncode == 0 and result.stderr == "", result.stderr
        said.append(re.sub(r" \| ETA: .*", "", result.stdout.replace(str(out), "")))
    assert said[0] == said[1] and "finished: 3 steps" in said[0]
    files = [sorted(path.relative_to(out) for path in out.rglob("*")) for out in folders]
    assert files[0] == files[1]
    one, other = (without_clock(read_jsonl(out / "metrics.jsonl")) for out in folders)
    assert one == other
    for name in ("samples.jsonl", "controller.jsonl", "final/model.safetensors"):
        one, other = ((out / name).read_bytes() for out in folders)
        assert one == other, name


@pytest.mark.skipif(sys.platform != "linux", reason="finds the threads in /proc")
def test_what_is_forked_has_no_threads(warm):
    """A lock that another thread held would never be free. jemalloc takes care of its own."""
    warm.start([sys.executable, "-m", "this"], ENVIRONMENT).communicate(timeout=60)
    threads = Path(f"/proc/{warm.process.pid}/task").iterdir()
    names = {each.name: (each / "comm").read_text().strip() for each in threads}
    assert names.pop(str(warm.process.pid))
    assert {*names.values()} <= {"jemalloc_bg_thd"}


PROGRAM = """
import signal, sys
assert "torch" in sys.modules and __name__ == "__main__"
print(sys.argv[1:], sys.stdin.read(), flush=True)
if sys.argv[1] == "wait":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    print("waits", flush=True)
    signal.pause()
print("x" * 1_000_000, file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(warm, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return lambda *words: warm.start([sys.executable, str(path), *words], ENVIRONMENT)


@pytest.mark.parametrize("status", [0, 3])
def test_words_streams_and_status_are_its_own(program, status):
    process = program(str(status), "two words")
    out, err = process.communicate(timeout=60)
    assert process.returncode == process.poll() == status
    assert out == f"['{status}', 'two words'] \n" and len(err) == 1_000_001


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 7), (signal.SIGINT, -2)]
)
def test_a_signal_reaches_it_and_is_told(program, number, status):
    process = program("wait")
    assert [process.stdout.readline() for _ in range(2)] == ["['wait'] \n", "waits\n"]
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)


def test_another_environment_needs_a_fresh_one(warm):
    assert warm.fits(ENVIRONMENT | {"NO_COLOR": "1", "PYTHONPATH": "elsewhere"})
    assert not warm.fits(ENVIRONMENT | {"HF_HUB_OFFLINE": "0"})
    assert not warm.fits({})
