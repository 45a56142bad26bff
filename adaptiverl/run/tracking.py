"""What a run writes as it goes: metrics, samples and the controller's reasons, console lines.

TensorBoard and W&B are accelerate's; checkpoints are checkpoint.py's.
"""

import json
import math
import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from adaptiverl.run.checkpoint import FILES
from adaptiverl.run.console import printable

Row = dict[str, Any]
# What the program writes to metrics.jsonl and samples.jsonl, and the first parts of such names
OWN_NAMES = {
    "braked", "completion", "completion_ids", "entropy", "frac_reward_zero_std", "grad_norm", "kl",
    "kl_coef", "kl_per_completion", "kl_step", "kl_step_evidence", "kl_step_target", "logprobs",
    "loss", "lr", "momentum", "prompt", "reward", "reward_std", "skipped", "step",
    "tokens_per_second",
}  # fmt: skip
OWN_PREFIXES = ("completions/", "eval/", "held_out/", "rewards/", "sampling/", "seconds/")


def is_own(name: str) -> bool:
    """Whether the program writes, or may write, something under this name: a reward may not."""
    return name in OWN_NAMES or name.startswith(OWN_PREFIXES)


class RunLog:
    """Appends to the files of a run in `output_dir`, first cutting off what came after `step`.

    So a run that was killed past its last checkpoint and resumed has each step once.
    """

    def __init__(
        self, output_dir: Path, step: int, last_step: int, log_every: int, dynamics: bool = False
    ):
        output_dir.mkdir(parents=True, exist_ok=True)
        self.files = []
        for name in FILES if dynamics else FILES[:-1]:
            path = output_dir / name
            _keep_until(path, step)
            self.files.append(path.open("a", encoding="utf-8"))
        self.log_every, self.last_step = log_every, last_step
        # disable=None: a bar on a terminal, nothing in a file or a pipe
        self.bar = tqdm(total=last_step, initial=step, disable=None, unit="step")

    def step(
        self,
        metrics: Row,
        samples: Iterable[Row],
        reasons: Iterable[Row],
        dynamics: Sequence[Row] = (),
    ) -> None:
        """Records one step; the files are flushed, so that a kill loses nothing."""
        for file, rows in zip(self.files, ([metrics], samples, reasons, dynamics), strict=False):
            file.writelines(map(_line, rows))
            file.flush()
        self.bar.update()
        if metrics["reward"] is not None:
            self.bar.set_postfix_str(f"reward {metrics['reward']:.3f}", refresh=False)
        step = metrics["step"]
        if self.log_every and (step in (1, self.last_step) or step % self.log_every == 0):
            self.say(step_line(metrics))

    def say(self, line: str) -> None:
        """A line on the console, above the progress bar."""
        self.bar.write(line)
        sys.stdout.flush()  # a pipe or a file shows each line when it is said

    def sync(self) -> None:
        """Forces the files to disk: before a checkpoint claims their steps."""
        for file in self.files:
            os.fsync(file.fileno())

    def close(self) -> None:
        self.bar.close()
        for file in self.files:
            file.close()


def step_line(metrics: dict[str, Any]) -> str:
    """Step 50 | Reward: 0.82 | Loss: -0.3456 | LR: 3.2e-05 | Momentum: 0.912"""
    reward = _reward(metrics["reward"])
    line = (
        f"Step {metrics['step']} | Reward: {reward} | Loss: {metrics['loss']:.4f} | "
        f"LR: {metrics['lr']:.3g} | Momentum: {metrics['momentum']:.3f}"
    )
    if "kl" in metrics:
        line += f" | KL: {round(metrics['kl'], 3) + 0.0:.3f}"  # + 0.0: never "-0.000"
    if "eval/reward" in metrics:
        line += f" | Eval reward: {_reward(metrics['eval/reward'])}"
    return line


def _reward(value: float | None) -> str:
    return "missing" if value is None else f"{value:.2f}"


def dynamics_lines(optimizer: str, step: int, rows: Sequence[Row]) -> str:
    """[OnlineAdamW] Step 100 dynamics: and two lines a tensor, as seed 1 has them."""
    lines = [f"[{optimizer}] Step {step} dynamics:"]
    for row in rows:
        head = {k: row[k] for k in ("grad_signal", "hidden_norm", "delta_scale")}
        shown = " | ".join(f"{k}={v:.4f}" for k, v in head.items())
        lines.append(f"  Tensor {row['tensor']} | {shown} | {row['name']}")
        rest = {k: v for k, v in row.items() if k not in (*head, "step", "tensor", "name")}
        if rest:
            small = {k: k.endswith("mean") and v >= 1e-6 for k, v in rest.items()}
            texts = [f"{k}={v:.6f}" if small[k] else f"{k}={v:.4g}" for k, v in rest.items()]
            lines.append("  " + " ".join(texts))
    return "\n".join(lines)


def table(columns: dict[str, list]) -> str:
    """Columns as aligned text, one row a line, long cells shortened."""
    cells = [list(columns)]
    cells += [[_cell(value) for value in row] for row in zip(*columns.values(), strict=True)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join(lines)


def _cell(value: Any, width: int = 60) -> str:
    if value is None:
        return "missing"
    text = f"{value:.3f}" if isinstance(value, float) else " ".join(str(value).split())
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def _line(row: Row) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError):  # something that JSON does not have
        return json.dumps(_plain(row), ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """In JSON's types: tensors and arrays are lists, what is not finite is null, the rest text."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _keep_until(path: Path, step: int) -> None:
    """Cuts the file after its last whole line of `step` or an earlier one.

    Read from the end: of a long file, only what is cut off is looked at.
    """
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n") + 1
        while end:
            begin = text.rfind(b"\n", 0, end - 1) + 1
            if _is_until(text[begin:end], step):
                break
            end = begin
    os.truncate(path, end)


def _is_until(line: bytes, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except ValueError:  # a power cut can leave zeros
        return False
