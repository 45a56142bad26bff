"""What a run writes as it goes: metrics, samples and the controller's reasons, console lines.

TensorBoard and W&B are accelerate's; checkpoints are checkpoint.py's.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adaptiverl.run.checkpoint import FILES

Row = dict[str, Any]


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
    reward = "missing" if metrics["reward"] is None else f"{metrics['reward']:.2f}"
    line = (
        f"Step {metrics['step']} | Reward: {reward} | Loss: {metrics['loss']:.4f} | "
        f"LR: {metrics['lr']:.3g} | Momentum: {metrics['momentum']:.3f}"
    )
    if "kl" in metrics:
        line += f" | KL: {round(metrics['kl'], 3) + 0.0:.3f}"  # + 0.0: never "-0.000"
    if "eval/reward" in metrics:
        line += f" | Eval reward: {metrics['eval/reward']:.2f}"
    return line


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
    return text if len(text) <= width else text[: width - 1] + "…"


def _line(row: Row) -> str:
    """JSON, with NaN and infinity, which it does not have, as null."""
    odd = [name for name, x in row.items() if isinstance(x, float) and not math.isfinite(x)]
    return json.dumps(row | dict.fromkeys(odd), ensure_ascii=False) + "\n"


def _keep_until(path: Path, step: int) -> None:
    """Cuts the file before the first line that is torn or of a later step."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            end += len(line)
    os.truncate(path, end)
