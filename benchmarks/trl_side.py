"""How the benchmarks set TRL's trainers up, on a CPU: what is not about learning is off.

bf16 and gradient checkpointing are TRL's defaults and would only slow it down there. Leaves out
what each benchmark gives both sides alike.
"""

from typing import Any

QUIET: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_strategy": "no",
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def trl_config(kind: str = "RLOO", **own: Any) -> Any:
    """RLOOConfig or GRPOConfig; `own` goes before QUIET."""
    import trl

    return getattr(trl, f"{kind}Config")(**(QUIET | own))
