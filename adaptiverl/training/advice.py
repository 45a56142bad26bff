"""What a run could do to be faster on this machine, and what to do where there was no room.

Leaves out what cannot be known before a step: compare the seconds of two dry runs.
"""

from collections.abc import Callable
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
