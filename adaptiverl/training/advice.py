"""What to do: to be faster on this machine, where there was no room, and after a run.

Leaves out what cannot be known before a step: compare the seconds of two dry runs.
"""

import shlex
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from adaptiverl.files.checkpoint import to_resume
from adaptiverl.files.room import remedy
from adaptiverl.training.build import Parts
from adaptiverl.training.keys import RunConfig

# Weights from which bf16 is recommended on a CPU. Seen in one run each: GPT-2 124M gains, the
# embedded model of 2.6 million gains nothing. Between them nothing was measured.
LARGE = 50_000_000


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16: AVX512-BF16 or AMX."""
    cpu = torch.cpu  # which names these two for itself; what it names for all has only AVX2
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def bf16_advice(
    c: RunConfig, parts: Parts, has_bf16: Callable[[], bool] = cpu_multiplies_bf16
) -> str | None:
    """One line that recommends BF16, or None where it is on or would hardly help.

    `has_bf16` says whether the CPU multiplies in bf16.
    """
    if parts.runtime.device.type != "cpu" or c.BF16 or c.LOAD_4BIT or c.LOAD_8BIT:
        return None
    weights = sum(p.numel() for p in parts.sampler.policy.parameters())
    if weights < LARGE or not has_bf16():
        return None
    return (
        f"this CPU has instructions for bf16, and the model has {weights / 1e6:,.0f} million "
        "weights: BF16=true is probably faster (--dry-run shows the seconds of a step)"
    )


def room_advice(c: RunConfig, error: Exception) -> str:
    """What to do about a file for which there was no room, and whether the run can go on then."""
    found = to_resume(c.output_dir)
    if isinstance(found, Path):
        return f"{remedy(error)}; RESUME=auto goes on from {Path(c.OUTPUT_DIR) / found.name}"
    return f"{remedy(error)}; {found or 'there is no checkpoint, so the run starts anew'}"


def _program() -> str:
    """How a shell starts the command in this folder."""
    if shutil.which("adaptiverl"):
        return "adaptiverl"
    # As `python -m` looks for it; the folder of train.py, which is first here, may be another
    found = PathFinder.find_spec("adaptiverl", [str(Path.cwd()), *sys.path[1:]])
    where = "" if found else f"PYTHONPATH={shlex.quote(str(Path(__file__).parents[2]))} "
    return f"{where}python -m adaptiverl"


def next_commands(path: Path, has_report: bool) -> list[str]:
    """Where the report is, and what to do with a run and its model."""
    program = _program()
    report = [f"report: {path / 'report.html'}"] if has_report else []
    follow = ["doctor", "generate"] if has_report else ["report", "doctor", "generate"]
    heads = ["next:", *["     "] * len(follow)]
    return report + [
        f"{head} {program} {name} {shlex.quote(str(path))}"
        for head, name in zip(heads, follow, strict=False)
    ]
