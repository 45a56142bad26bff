"""A run read from its folder alone, also while it is written: no torch, no model.

What the numbers mean is said by the checks (checks_*.py), the verdict and the pages.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from adaptiverl.config.schema import ConfigError
from adaptiverl.files.manifest import MANIFEST, read_manifest
from adaptiverl.optim.rules import parse_rules

Row = dict[str, Any]
SHORT = 30  # steps; fewer say little
REWARDS = {"reward", "reward_fixed_scale", "eval/reward", "eval/score"}  # sums of rewards
FIXED = "on the scale of the first batch, with the last weights"  # what reward_fixed_scale is


class Change(NamedTuple):
    """From the first steps to the last: both means, and the standard error of their difference."""

    first: float
    last: float
    error: float

    @property
    def z(self) -> float:
        """In standard errors; infinite where nothing scatters."""
        difference = self.last - self.first
        if self.error:
            return difference / self.error
        return math.copysign(math.inf, difference) if difference else 0.0


class Torn(NamedTuple):
    """A line that is not whole: of which file, its number, and whether the file ends within it."""

    file: str
    line: int
    is_last: bool


@dataclass
class Run:
    """The files of a run; `torn` are their lines that are not whole.

    `odd` says which values of which lines are no finite numbers where such belong, and which steps
    come twice: left out.
    """

    path: Path
    config: Row
    metrics: list[Row]
    changes: list[Row]
    events: list[Row]
    progress: list[Row]
    torn: list[Torn]
    odd: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that is written down; 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def reward(self) -> str:
        """The metric by which steps can be compared: NORMALIZE and schedules move `reward`."""
        first = next((row for row in self.metrics if row.get("reward") is not None), {})
        return "reward_fixed_scale" if "reward_fixed_scale" in first else "reward"

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric is known."""
        return [(row["step"], row[name]) for row in self.metrics if row.get(name) is not None]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.series(name)]

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """The metrics so named, in their order."""
        every = dict.fromkeys(name for row in self.metrics for name in row)
        return [name for name in every if name.startswith(prefix) and name.endswith(suffix)]

    def change(self, name: str) -> Change | None:
        """Over the first and last third, of ten steps at most; None of fewer than three each.

        Of a reward whose code has changed, since then.
        """
        first, last = ([value for _, value in end] for end in ends(self, name))
        return change(first, last) if len(first) >= 3 else None

    def late(self, name: str) -> float | None:
        """The mean over the last tenth, of three steps at least."""
        known = self.values(name)
        return statistics.mean(known[-max(3, len(known) // 10) :]) if known else None

    def samples(self, odd: list[int] | None = None) -> Iterator[Row]:
        """The rows of samples.jsonl, one after the other; lines that are not whole are left out.

        So are rows that lack a step, prompt or completion; the numbers of their lines go to `odd`.
        """
        path = self.path / "samples.jsonl"
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as lines:
                for number, line in enumerate(lines, 1):
                    if (row := json_object(line)) is None:
                        continue
                    if _is_sample(row):
                        yield row
                    elif odd is not None:
                        odd.append(number)

    @property
    def rewards(self) -> list[Row]:
        return self.config.get("REWARDS", [])

    @property
    def trust_region(self) -> bool:
        rules = parse_rules("lr_rule", self.config.get("LR_RULE", "none"))
        return any(rule.name == "trust_region" for rule, _ in rules)

    @cached_property
    def checkpoints(self) -> dict[str, int]:
        """The step of each checkpoint, by the name of its folder; not of those in `damaged`."""
        found = {}
        for path in _manifests(self.path):
            with suppress(ValueError):
                found[path.parent.name] = read_manifest(path.parent).step
        return found

    @cached_property
    def state(self) -> str:
        """finished, stopped (it says why in its events), running or killed."""
        final = self.checkpoints.get("final", 0)
        if (self.metrics and final == self.step) or (final > self.step and self._has_whole_final()):
            return "finished"
        last = self.events[-1] if self.events else None
        if last and last["action"] == "stop" and last["step"] >= self.step:
            return "stopped"
        return "running" if _is_locked(self.path / ".lock") else "killed"

    def _has_whole_final(self) -> bool:
        """A run that goes on from before a damaged final/ leaves it there until its end."""
        from adaptiverl.files import checkpoint  # imports torch

        return checkpoint.damage(self.path / "final") is None


def ends(run: Run, name: str) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, value) of the first and of the last steps that `Run.change` compares."""
    known = comparable(run, name)
    size = min(10, len(known) // 3)
    return known[:size], known[len(known) - size :]


def comparable(run: Run, name: str) -> list[tuple[int, float]]:
    """(step, value) wherever the metric is known; of rewards, since the code of one has changed."""
    since = max((row["step"] for row in run.events if row["kind"] == "reward code"), default=0)
    is_reward = name in REWARDS or "rewards/" in name
    return [each for each in run.series(name) if not is_reward or each[0] > since]


def read_run(path: Path) -> Run:
    """Raises ConfigError where no run was written."""
    metrics = path / "metrics.jsonl"
    if not metrics.exists():
        if _manifests(path):
            raise ConfigError(
                f"{metrics} is missing, so nothing is known of the run's steps: put it back from a "
                "copy. Its checkpoints do not need it: RESUME=auto goes on, generate uses them"
            )
        says = "holds no run" if path.is_dir() else "is not a folder"
        raise ConfigError(f"{path} {says}: name the OUTPUT_DIR of a run")
    config = path / "config.json"
    keys = json_object(config.read_text("utf-8", "replace")) if config.exists() else {}
    names = ("metrics", "controller", "events", "progress")
    read = [_numbered_rows(path / f"{name}.jsonl") for name in names]
    odd = _drop_odd(metrics.name, read[0][0])
    odd += _drop_odd("controller.jsonl", read[1][0], ("step", "old", "new", "value"))
    torn = [line for _, broken in read for line in broken]
    rows, changes, events, progress = (list(numbered.values()) for numbered, _ in read)
    return Run(path, keys or {}, rows, changes, events, progress, torn, odd)


def mend_config(path: Path) -> str:
    """Which checkpoint's copy of config.json to put in its place; "" where there is none."""
    copies = [manifest.with_name("run_config.json") for manifest in _manifests(path)]
    copy = next((each for each in copies if each.exists()), None)
    return f"put {copy} in its place: it has the same keys" if copy else ""


def _manifests(path: Path) -> list[Path]:
    """Of all checkpoints; those that are hidden are not finished."""
    found = sorted(path.glob(f"*/{MANIFEST}"))
    return [manifest for manifest in found if not manifest.parent.name.startswith(".")]


def damaged(run: Run) -> dict[str, str]:
    """What is wrong with each manifest that cannot be read, by the name of its folder."""
    found = {}
    for path in _manifests(run.path):
        try:
            read_manifest(path.parent)
        except ValueError as error:
            found[path.parent.name] = str(error)
    return found


def change(first: Sequence[float], last: Sequence[float]) -> Change:
    """Of values that scatter independently."""
    error = math.sqrt(sum(statistics.variance(part) / len(part) for part in (first, last)))
    return Change(statistics.mean(first), statistics.mean(last), error)


def smoothed(values: Sequence[float], width: int | None = None) -> list[float]:
    """The mean over `width` values around each (a tenth of them, 3 to 51), fewer at the ends."""
    half = (width or max(3, min(51, len(values) // 10))) // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    bounds = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in bounds]


def whole_rows(path: Path) -> list[Row]:
    """The lines that are JSON; none if there is no such file."""
    return list(_numbered_rows(path)[0].values())


def metric_rows(path: Path) -> list[Row]:
    """The same of a metrics.jsonl, without what is no finite number."""
    rows, _ = _numbered_rows(path)
    _drop_odd(path.name, rows)
    return list(rows.values())


def _drop_odd(file: str, rows: dict[int, Row], names: Sequence[str] | None = None) -> list[str]:
    """Drops values that are no finite numbers, and says where; a row without its step goes whole.

    So does one whose step a row before has. `names` are those that a row must have, all or none;
    None for any, and null is a missing one.
    """
    said, seen = [], set()
    for line, row in list(rows.items()):
        named = names or [name for name, value in row.items() if value is not None]
        odd = [name for name in named if not _is_number(row.get(name))]
        if names is None:
            if not isinstance(step := row.get("step"), int):
                odd = ["step", *(name for name in odd if name != "step")]
            elif step in seen:
                said.append(f"line {line} of {file}: step {step} again")
                del rows[line]
                continue
            else:
                seen.add(step)
        for name in odd:
            row.pop(name, None)
        if odd and (names or "step" in odd):
            del rows[line]
        if odd:
            said.append(f"line {line} of {file}: {', '.join(odd)}")
    return said


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _numbered_rows(path: Path) -> tuple[dict[int, Row], list[Torn]]:
    """The lines that are JSON by their numbers, and which are torn: no JSON, or without an end."""
    if not path.exists():
        return {}, []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    numbered = {number: json_object(line) for number, line in enumerate(lines, 1) if line}
    rows = {number: row for number, row in numbered.items() if row is not None}
    torn = [n for n, row in numbered.items() if row is None or n == len(lines)]
    return rows, [Torn(path.name, number, number == len(lines)) for number in torn]


def _is_sample(row: Row) -> bool:
    is_prompt = isinstance(row.get("prompt"), str | list)
    return is_prompt and isinstance(row.get("completion"), str) and _is_number(row.get("step"))


def json_object(line: str) -> Row | None:
    """None of a line that is not whole: a disk was full, or the power failed."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _is_locked(path: Path) -> bool:
    """Whether a run holds its folder now; false where that is not known."""
    if path.exists():
        try:
            with filelock.FileLock(path, timeout=0, fallback_to_soft=False):
                pass
        except filelock.Timeout:
            return True
        except (OSError, NotImplementedError):  # no locks there, or no right to write
            pass
    return False
