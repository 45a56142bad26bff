"""What tests share: an offline environment, a tiny random GPT-2, and runs of train.py."""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from warm import Process, Server

if TYPE_CHECKING:
    from adaptiverl.rl.rollout import Rollout
    from adaptiverl.training.build import Parts

ROOT = Path(__file__).parent.parent
# What was compiled is kept, whatever the shell says: every process would compile it all anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A suite in the background, or under nohup, is to ignore these; what it starts would, too.
for name in ("SIGINT", "SIGQUIT", "SIGHUP"):
    number = getattr(signal, name, None)  # Windows lacks two
    if number and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
CACHE = tempfile.TemporaryDirectory()  # of `datasets`, instead of the user's
# One thread: the same sums in the same order, whatever machine and number of processes.
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_CACHE": CACHE.name,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parent),
}
os.environ |= {key: ENVIRONMENT[key] for key in ("HF_HUB_OFFLINE", "HF_DATASETS_CACHE")}

RANDOM_REWARD = """
import random
def noise(completions, **columns):
    return [random.random() for _ in completions]
"""
PROMPTS = [
    {"prompt": "This", "reference": "is a wonderful film."},
    {"prompt": "The acting in this film", "reference": "is superb."},
    {"prompt": "I watched it with my brother on a Sunday and we both", "reference": "loved it."},
    {"prompt": "One of the best", "reference": "films of the year."},
    {"prompt": "My wife", "reference": "laughed all evening."},
]


def pytest_collectstart() -> None:
    settle()


def pytest_collection_finish() -> None:
    """A tenth of the suite's time went to looking for cycles in what was imported: never again."""
    gc.freeze()
    gc.enable()


@cache
def settle() -> None:
    """Where tests are collected: the process that only hands them out needs no torch."""
    gc.disable()  # until all is imported, of which nothing is garbage
    import hypothesis
    import torch

    torch.set_num_threads(1)
    hypothesis.settings.register_profile("tests", deadline=None)  # no test is timed
    hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 of two layers, GPT-2's dropout of 0.1 and pad = EOS."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "adaptiverl/assets/policy")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,  # sharp enough for a wrong position to show
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    """The keys of a run that takes a second."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    return {
        "MODEL": str(tiny),
        "TRAIN_FILE": str(prompts),
        "OUTPUT_DIR": str(tmp_path / "run"),
        "REWARDS": [{"TYPE": "regex", "PATTERNS": "th"}, {"TYPE": "length", "TARGET": 6}],
        "BATCH_SIZE": 8,
        "NUM_GENERATIONS": 4,
        "MAX_NEW_TOKENS": 8,
        "LRATE": 1e-3,
        "STEPS": 3,
        "SAVE_EVERY": 0,
    }


@pytest.fixture(scope="session")
def warm() -> Iterator[Server]:
    """Starts what is asked in ENVIRONMENT, torch and transformers already imported."""
    server = Server(ENVIRONMENT)
    yield server
    server.close()


@pytest.fixture
def start(tmp_path: Path, warm: Server) -> Callable[..., subprocess.Popen | Process]:
    """Starts `python train.py` on a dict of keys, or on a config file.

    From an interpreter that has imported torch, unless a `fresh` one is asked for.
    """
    import torch

    def run(
        config: dict | Path,
        *arguments: str,
        launcher: tuple[str, ...] = (sys.executable,),
        program: str = "train.py",
        fresh: bool = False,
    ):
        if isinstance(config, dict):
            path = tmp_path / "config.json"
            path.write_text(json.dumps(config))
            config = path
        command = [*launcher, program, str(config), *arguments]
        forks = os.name != "nt" and not torch.cuda.is_available()  # CUDA bears none
        if forks and not fresh and warm.fits(ENVIRONMENT):
            return warm.start(command, ENVIRONMENT)
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return run


@pytest.fixture
def run(start) -> Callable[..., subprocess.CompletedProcess]:
    """As `start`, and waits for the end."""

    def wait(*arguments, **options) -> subprocess.CompletedProcess:
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return wait


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what depends on how fast the machine was."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds/", "tokens_per_second"))}
        for row in rows
    ]


@contextmanager
def in_this_process() -> Iterator[None]:
    """Around a run in this process: forgets earlier devices."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield


@pytest.fixture
def main(tmp_path, monkeypatch) -> Callable[..., int]:
    """Runs train.main on a dict of keys, or on a config file, in this process; its exit status.

    For tests of what a run does rather than of the process: importing takes longer than a run.
    """
    import train

    monkeypatch.chdir(ROOT)

    def run(config: dict | Path, *arguments: str) -> int:
        path = config if isinstance(config, Path) else tmp_path / "keys.json"
        if isinstance(config, dict):
            path.write_text(json.dumps(config))
        monkeypatch.setattr("sys.argv", ["train.py", str(path), *arguments])
        with in_this_process():
            try:
                return train.main()
            except SystemExit as end:  # a mistake in the config
                assert isinstance(end.code, int)
                return end.code

    return run


@pytest.fixture
def run_parts(tmp_path, monkeypatch) -> Callable[..., int]:
    """Builds the parts of a run from a dict of keys, trains with `change(parts)`; the exit status.

    `change` may replace parts by others: `dataclasses.replace(parts, checked=..., guards=...)`.
    Where `main` prints a mistake, this raises ConfigError.
    """
    import train
    from adaptiverl.config.loading import load_config
    from adaptiverl.training.build import Parts, build
    from adaptiverl.training.keys import RunConfig

    monkeypatch.chdir(ROOT)

    def run(settings: dict, change: Callable[[Parts], Parts], *overrides: str) -> int:
        path = tmp_path / "keys.json"
        path.write_text(json.dumps(settings))
        config = load_config(path, overrides, schema=RunConfig)
        with in_this_process():
            parts = build(config)
            with closing(parts.scoring):
                return train.run(config, change(parts))

    return run


def with_samples(parts: "Parts", change: Callable[["Rollout"], object]) -> "Parts":
    """`parts` whose samples are first given to `change`, which may alter them in place."""
    from adaptiverl.training.checked import CheckedPolicy

    class Altered(CheckedPolicy):
        def sample(self, *arguments):
            rollout = super().sample(*arguments)
            change(rollout)
            return rollout

    old = parts.checked
    checked = Altered(old.config, old.runtime, old.sampler, old.progress)
    return replace(parts, checked=checked)


def around_steps(parts: "Parts", around: Callable[[Callable[[], None]], object]) -> "Parts":
    """`parts` that call `around(take_step)` for each step of the optimizer."""
    from adaptiverl.training.runtime import Runtime

    class Watched(Runtime):
        def step(self, optimizer, **arguments):
            around(partial(super().step, optimizer, **arguments))

    runtime = Watched(parts.runtime.accelerator)
    runtime.policy = parts.runtime.policy
    return replace(parts, runtime=runtime)


@pytest.fixture
def products_of_cuda(monkeypatch) -> Callable[[], None]:
    """Once called, projections multiply in half precision and give fp32, as CUDA alone can.

    Every tensor says that it is on CUDA. `torch.mm` stands in for CUDA's.
    """
    import torch

    mm = torch.mm

    def with_fp32_result(a, b, *, out=None, out_dtype=None):
        assert out_dtype is None or a.dtype == b.dtype != out_dtype == torch.float32
        assert a.dtype == torch.float32 or out_dtype, "a result would be rounded"
        a, b = a.to(out_dtype or a.dtype), b.to(out_dtype or b.dtype)
        return mm(a, b, out=out) if out is not None else mm(a, b)

    def begin() -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch, "mm", with_fp32_result)

    return begin


def written_run(folder: Path, metrics: list[dict], config: dict, **files: list[dict]) -> Path:
    """A folder as a finished run leaves it, or one that its events say was stopped."""
    (folder / "final").mkdir(parents=True)
    step = metrics[-1]["step"] if metrics else 0
    (folder / "final/manifest.json").write_text(json.dumps({"step": step, "files": {}}))
    (folder / "config.json").write_text(json.dumps(config))
    empty = {name: [] for name in ("controller", "samples", "progress", "environment")}
    for name, rows in ({"metrics": metrics} | empty | files).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder
