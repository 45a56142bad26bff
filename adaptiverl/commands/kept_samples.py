"""Which completions of a run the report shows, so that the page stays small: all of some steps,
the best, the worst and a random one of the others, fewer where texts are long."""

import json
import math
import random
from typing import Any, NamedTuple

from adaptiverl.commands.charts import rounded
from adaptiverl.commands.curves import Row, Run
from adaptiverl.commands.sample_facts import SampleFacts, steps_of
from adaptiverl.rl.chat import readable

BYTES = 850_000  # of all rows as JSON
WHOLE = 8  # steps of which all rows are kept, at most
ROWS = 256  # of a whole step, at most
LETTERS = 600  # of a prompt or a completion
Steps = list[tuple[int, list[list[Any]]]]  # of each its number and rows


class Kept(NamedTuple):
    """Rows are [step, which, prompt, completion, reward, the others of `columns` …]."""

    columns: list[str]
    rows: list[list[Any]]
    steps: list[int]
    note: str


def kept_samples(run: Run, facts: SampleFacts) -> Kept:
    names = [reward["NAME"] for reward in run.rewards if len(run.rewards) > 1]
    columns = ["step", "which", "prompt", "completion", "reward", *names]
    count = facts.count / facts.steps if facts.steps else 0
    whole = {round(k * (facts.steps - 1) / (WHOLE - 1)) for k in range(WHOLE)}
    few: Steps = []  # of the steps that are not whole
    all_of: Steps = []
    for number, rows in enumerate(steps_of(run)):
        marks = _marks(rows)
        if number in whole:
            chosen = [*range(min(len(rows), ROWS)), *(k for k in marks if k >= ROWS)]
            all_of.append((rows[0]["step"], [_row(rows[k], marks.get(k), names) for k in chosen]))
        if number not in whole or count > 3:
            marked = [_row(rows[k], which, names) for k, which in marks.items()]
            few.append((rows[0]["step"], marked))
    all_of = _within(all_of, BYTES * 0.6)
    done = {step for step, _ in all_of}
    few = _within([each for each in few if each[0] not in done], BYTES - _bytes(all_of))
    steps = sorted([*all_of, *few])
    shown = [row for _, rows in steps for row in rows]
    note = (
        f"{len(shown):,} of {facts.count:,} completions: all of {len(all_of)} steps"
        + (f" (at most {ROWS} of each)" if count > ROWS else "")
        + (f", and the best, the worst and a random one of {len(few)} others" if few else "")
        + "."
    )
    if left := facts.steps - len(steps):
        note += f" Left out: {left} steps; samples.jsonl has them all."
    return Kept(columns, shown, [step for step, _ in steps], note)


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
    own = ["reward", *(f"rewards/{name}" for name in names)]
    texts = [_cut(readable(row["prompt"])), _cut(row["completion"])]
    values = [None if row.get(name) is None else rounded(row[name]) for name in own]
    return [row["step"], which or "other", *texts, *values]


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"


def _within(steps: Steps, limit: float) -> Steps:
    """Evenly fewer of them, the first and the last among them, where all are too many bytes."""
    size = _bytes(steps)
    if size <= limit or len(steps) < 2:
        return steps
    keep = max(1, math.floor(len(steps) * limit / size))
    if keep == 1:
        return steps[-1:]
    chosen = sorted({round(k * (len(steps) - 1) / (keep - 1)) for k in range(keep)})
    return [steps[k] for k in chosen]


def _bytes(steps: Steps) -> int:
    return sum(len(json.dumps(rows)) for _, rows in steps)
