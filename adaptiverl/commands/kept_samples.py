"""Which completions of a run the report shows, so that the page stays small: all of some steps,
the best, the worst and a random one of the others, fewer where texts are long."""

import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

from adaptiverl.commands.curves import Row, Run
from adaptiverl.commands.sample_facts import SampleFacts, steps_of
from adaptiverl.rl.chat import readable

BYTES = 850_000  # of all rows as JSON
WHOLE = 8  # steps of which all rows are kept, at most
ROWS = 256  # of a whole step, at most
LETTERS = 600  # of a prompt or a completion


@dataclass
class Kept:
    """Rows are [step, which, prompt, completion, reward, the others of `columns` …]."""

    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    note: str = ""


def kept_samples(run: Run, facts: SampleFacts) -> Kept:
    names = [reward["NAME"] for reward in run.rewards]
    components = names if len(names) > 1 else []
    columns = ["step", "which", "prompt", "completion", "reward", *components]
    count = facts.count / facts.steps if facts.steps else 0
    whole = {round(k * (facts.steps - 1) / (WHOLE - 1)) for k in range(WHOLE)}
    few: list[tuple[int, list[list[Any]]]] = []  # of the steps that are not whole
    all_of: list[tuple[int, list[list[Any]]]] = []
    for number, rows in enumerate(steps_of(run)):
        marks = _marks(rows)
        if number in whole:
            chosen = list(range(min(len(rows), ROWS)))
            chosen += [k for k in marks if k >= ROWS]
            all_of.append((rows[0]["step"], [_row(rows[k], marks.get(k), names) for k in chosen]))
        if number not in whole or count > 3:
            few.append(
                (rows[0]["step"], [_row(rows[k], which, names) for k, which in marks.items()])
            )
    all_of = _within(all_of, BYTES * 0.6)
    done = {step for step, _ in all_of}
    few = [each for each in few if each[0] not in done]
    few = _within(few, BYTES - _bytes(all_of))
    steps = sorted([*all_of, *few])
    kept = Kept(columns, [row for _, rows in steps for row in rows], [step for step, _ in steps])
    kept.note = (
        f"{len(kept.rows):,} of {facts.count:,} completions: all of {len(all_of)} steps"
        + (f" (at most {ROWS} of each)" if count > ROWS else "")
        + (f", and the best, the worst and a random one of {len(few)} others" if few else "")
        + "."
    )
    if left := facts.steps - len(steps):
        kept.note += f" Left out: {left} steps; samples.jsonl has them all."
    return kept


def _marks(rows: list[Row]) -> dict[int, str]:
    """The best, the worst and a random one, by their number; missing rewards are neither."""
    known = [k for k, row in enumerate(rows) if row.get("reward") is not None]
    marks = {}
    if known:
        marks[max(known, key=lambda k: rows[k]["reward"])] = "best"
        marks.setdefault(min(known, key=lambda k: rows[k]["reward"]), "worst")
    if rest := [k for k in range(len(rows)) if k not in marks]:
        marks[random.Random(rows[0]["step"]).choice(rest)] = "random"
    return marks


def _row(row: Row, which: str | None, names: list[str]) -> list[Any]:
    values = [_short(row.get(f"rewards/{name}")) for name in names] if len(names) > 1 else []
    texts = [_cut(readable(row["prompt"])), _cut(row["completion"])]
    return [row["step"], which or "other", *texts, _short(row.get("reward")), *values]


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _within(steps: list[tuple[int, list]], limit: float) -> list[tuple[int, list]]:
    """Evenly fewer of them, the first and the last among them, where all are too many bytes."""
    size = _bytes(steps)
    if size <= limit or len(steps) < 2:
        return steps
    keep = max(1, math.floor(len(steps) * limit / size))
    if keep == 1:
        return steps[-1:]
    chosen = sorted({round(k * (len(steps) - 1) / (keep - 1)) for k in range(keep)})
    return [steps[k] for k in chosen]


def _bytes(steps: list[tuple[int, list]]) -> int:
    return sum(len(json.dumps(rows)) for _, rows in steps)
