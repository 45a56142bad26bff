"""The files that a run appends to, one JSON object per line, and its progress bar.

TensorBoard and W&B are accelerate's; checkpoints are checkpoint.py's.
"""

import json
import math
import mmap
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from adaptiverl.files.checkpoint import FILES
from adaptiverl.files.room import naming

Row = dict[str, Any]
# Half of a character, as a file's name or a server's JSON may have, becomes its escape in JSON
ESCAPED = "backslashreplace"


class RunLog:
    """Appends to `files` in `output_dir`, and first removes their lines after step `step`.

    So a run that was killed after its last checkpoint, and resumed, has each step once.
    """

    def __init__(
        self, output_dir: Path, step: int, last_step: int, files: Iterable[str] = FILES[:-1]
    ):
        output_dir.mkdir(parents=True, exist_ok=True)
        self.output_dir, self.first, self.last_step = output_dir, step, last_step
        self.began, self.done = time.monotonic(), 0  # steps since then
        self.replaced: dict[str, list[Row]] = {}
        self.files = {}
        self.kept: dict[str, int] = {}  # the last step of each file that is left
        for name in files:
            self.kept[name] = _keep_until(output_dir / name, step)
            self.files[name] = (output_dir / name).open("a", encoding="utf-8", errors=ESCAPED)
        # disable=None: a bar on a terminal, nothing in a file or a pipe
        self.bar = tqdm(total=last_step, initial=step, disable=None, unit="step")

    def write(self, name: str, rows: Iterable[Row]) -> None:
        """Appends to the file `name` and flushes it, so that a kill loses nothing."""
        with naming(self.output_dir / name):
            self.files[name].writelines(map(_line, rows))
            self.files[name].flush()

    def replace(self, name: str, rows: list[Row]) -> None:
        """Makes `rows` all of the small file `name`, at once; without rows there is none."""
        if rows == self.replaced.get(name):
            return
        path = self.output_dir / name
        new = path.with_suffix(".new")  # not .new-*: those are unfinished checkpoints, folders
        self.replaced[name] = list(rows)
        if not rows:
            path.unlink(missing_ok=True)
            new.unlink(missing_ok=True)
            return
        with naming(path), new.open("w", encoding="utf-8", errors=ESCAPED) as file:
            file.writelines(map(_line, rows))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)

    def time_left(self) -> str:
        """The end of a line where no bar shows it: seconds per step so far, times those left."""
        left = self.last_step - self.first - self.done
        if not self.bar.disable or not (self.done and left):
            return ""
        seconds = (time.monotonic() - self.began) / self.done * left
        return f" | ETA: {tqdm.format_interval(round(seconds))}"

    def advance(self, reward: float | None) -> None:
        """One step on the progress bar."""
        self.done += 1
        self.bar.update()
        if reward is not None:
            self.bar.set_postfix_str(f"reward {reward:.3f}", refresh=False)

    def say(self, line: str) -> None:
        """A line on the console, above the progress bar."""
        self.bar.write(line)
        sys.stdout.flush()  # a pipe or a file shows each line at once

    def sync(self) -> None:
        """Forces the files to disk, before a checkpoint claims their steps."""
        for file in self.files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        self.bar.close()
        for name, file in self.files.items():
            with naming(self.output_dir / name):  # it writes what it could not write before
                file.close()


def read_rows(path: Path) -> list[Row]:
    """The whole lines of a file that a RunLog wrote, or is writing."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the last is empty, or unfinished


def _line(row: Row) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError):  # something that JSON does not have
        return json.dumps(_plain(row), ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """In JSON's types: tensors and arrays become lists, NaN and infinity null, the rest text."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _keep_until(path: Path, step: int) -> int:
    """Cuts the file after its last whole line of `step` or an earlier one, and returns that one.

    0 where no line is left. Read from the end: of a long file, only what is cut off is parsed.
    """
    if not path.exists() or not path.stat().st_size:
        return 0
    last: int | None = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n") + 1
        while end:
            begin = text.rfind(b"\n", 0, end - 1) + 1
            last = _step_of(text[begin:end])
            if last is not None and last <= step:
                break
            end, last = begin, 0
    os.truncate(path, end)
    return last or 0


def _step_of(line: bytes) -> int | None:
    """The step of a line; None for what no RunLog wrote: a power cut can leave zeros."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None
