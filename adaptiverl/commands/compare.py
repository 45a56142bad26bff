"""`adaptiverl compare RUN RUN…`: what differs between runs, in their keys, figures and curves.

Each run is compared with the first. Where SEED and prompts agree, steps are paired.
"""

import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from adaptiverl.commands.charts import Chart, Series, chart, number
from adaptiverl.commands.curves import Run, change, read_run, smoothed
from adaptiverl.commands.endings import reached, without_config
from adaptiverl.commands.pages import is_page, write_page
from adaptiverl.commands.sample_facts import steps_of
from adaptiverl.commands.written import check_writable
from adaptiverl.config.schema import ConfigError

FIGURES = (
    "reward",
    "reward_fixed_scale",
    "kl_per_completion",
    "entropy",
    "completions/mean_length",
    "eval/reward",
)
PAIRED_BY = ("SEED", "TRAIN_FILE", "BATCH_SIZE", "NUM_GENERATIONS")  # as many prompts, the same
BLOCKS = 8  # of neighbouring steps, which depend on each other: the error is that of their means
INTERVAL = 2.365  # standard errors: 95 % with BLOCKS - 1 = 7 degrees of freedom
LAST = 10  # steps that a figure at the end is the mean of
FIGURES_NOTE = (
    f"Means over the last {LAST} steps that have a value, fewer in a shorter run; eval/… is of the "
    "last evaluation. ± is one standard error."
)
OWN = {"OUTPUT_DIR", "$schema", "RESUME"}  # keys in which any two runs differ

Runs = dict[str, Run]  # by the short names of their folders; each is compared with the first


class Table(NamedTuple):
    heads: list[str]
    lines: list[list[str]]

    def text(self) -> str:
        return tabulate(self.lines, self.heads, disable_numparse=True) if self.lines else ""


def compare(folders: list[Path], out: Path) -> str:
    """The tables as text, and the page `out`; raises ConfigError where there is one run alone."""
    if len(folders) < 2:
        raise ConfigError("compare needs two runs or more: adaptiverl compare RUN RUN")
    read = [read_run(folder) for folder in folders]
    for run in read:
        if not run.metrics:
            raise ConfigError(f"{run.path / 'metrics.jsonl'} has no step yet")
    hint = "name another file by --out"
    check_writable(out, hint)
    if out.exists() and not is_page(out):
        raise ConfigError(f"{out} exists and was not written by adaptiverl: {hint}")
    runs = dict(zip(_names(folders), read, strict=True))
    keys, figures = differing_keys(runs), _figures(runs)
    differences, note = _differences(runs)
    unknown = " ".join(f"{why}." for run in read if (why := without_config(run)))
    values = {
        "names": list(runs),
        "verdict": _verdict(runs),
        "keys": keys,
        "keys_note": unknown or ("" if keys.lines else "None but OUTPUT_DIR."),
        "figures": figures,
        "figures_note": FIGURES_NOTE,
        "differences": differences,
        "differences_note": note,
        "charts": _charts(runs),
    }
    write_page("compare.html", out, values)
    short = Table(keys.heads, [[_cut(text) for text in line] for line in keys.lines])
    parts = [
        short.text() or "no key differs" * (not unknown),
        unknown,
        f"{figures.text()}\n{FIGURES_NOTE}",
        differences.text(),
        note,
        f"with curves: {out}",
    ]
    return "\n\n".join(part for part in parts if part)


def differing_keys(runs: Runs) -> Table:
    """The keys that differ, with their value in each run; without runs whose keys are lost."""
    known = {name: run.config for name, run in runs.items() if run.config}
    every = dict.fromkeys(key for config in known.values() for key in config if key not in OWN)
    lines = [[key, *(_text(config.get(key)) for config in known.values())] for key in every]
    return Table(["key", *known], [line for line in lines if len({*line[1:]}) > 1])


def paired(run: Run, other: Run, name: str) -> tuple[float, float, int] | None:
    """Mean of `other` − `run` over the steps that both have, half the width of its 95 % interval,
    and how many steps; None of fewer than two in each block."""
    own, steps = dict(run.series(name)), dict(other.series(name))
    differences = [steps[step] - own[step] for step in sorted(own.keys() & steps.keys())]
    size = len(differences) // BLOCKS
    if size < 2:
        return None
    rest = len(differences) - size * BLOCKS  # the first ones, which differ least
    means = [
        statistics.mean(differences[rest + k * size : rest + (k + 1) * size]) for k in range(BLOCKS)
    ]
    error = statistics.stdev(means) / math.sqrt(BLOCKS)
    return statistics.mean(means), INTERVAL * error, size * BLOCKS


def _why_unpaired(pair: Runs) -> str | None:
    """Why two runs do not see the same prompts in the same steps, as far as is known."""
    if lost := [name for name, run in pair.items() if not run.config]:
        return f"the keys of {' and of '.join(lost)} are not known"
    run, other = pair.values()
    keys = [key for key in PAIRED_BY if run.config.get(key) != other.config.get(key)]
    if keys or not _have_same_prompts(run, other):  # a file may have changed in between
        return f"other {', '.join(keys) or 'prompts'}"
    return None


def _have_same_prompts(run: Run, other: Run) -> bool:
    """In the first step that both have samples of; without one there is nothing against it."""
    steps = steps_of(run), steps_of(other)
    rows = [next(each, []) for each in steps]
    while all(rows):
        at = [own[0]["step"] for own in rows]
        if at[0] == at[1]:
            first, others = ([row["prompt"] for row in own] for own in rows)
            return first == others
        behind = int(at[1] < at[0])
        rows[behind] = next(steps[behind], [])
    return True


def _names(folders: list[Path]) -> list[str]:
    """Short and different: the folder's own name, with its parents' where that is not enough."""
    whole = [folder.resolve() for folder in folders]
    for size in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-size:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("compare: a run is named twice")


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str) -> str:
    return text if len(text) <= 48 else text[:47] + "…"


def _shared(runs: Runs) -> list[str]:
    """The figures that at least one run has; rewards and held-out ones that more than one has."""
    counts = Counter(
        name
        for run in runs.values()
        for name in {*run.names("rewards/", "/mean"), *run.names("held_out/rewards/", "/mean")}
    )
    own = sorted(name for name, count in counts.items() if count > 1)
    return [name for name in (*FIGURES, *own) if any(run.values(name) for run in runs.values())]


def _label(name: str) -> str:
    return name.removeprefix("completions/").removesuffix("/mean").replace("rewards/", "")


def _figures(runs: Runs) -> Table:
    """What FIGURES_NOTE says."""
    names, lines = _shared(runs), []
    for own, run in runs.items():
        steps, known = reached(run), len(run.metrics)
        line = [own, str(steps) if known == steps else f"{known} of {steps}"]
        for name in names:
            last = run.values(name)[-1 if name.startswith("eval/") else -LAST :]
            text = number(statistics.mean(last)) if last else "—"
            if len(last) > 2:
                text += f" ± {number(statistics.stdev(last) / math.sqrt(len(last)), 2)}"
            line.append(text)
        lines.append(line)
    return Table(["run", "steps", *map(_label, names)], lines)


def _differences(runs: Runs) -> tuple[Table, str]:
    """Each run less the first, paired by step where that is right; and what is to be said of it."""
    lines = list[list[str]]()
    unpaired, short = list[str](), list[str]()
    (first_name, first), *others = runs.items()
    for name, run in others:
        if why := _why_unpaired({first_name: first, name: run}):
            unpaired.append(f"{name} is not compared step by step: {why}.")
            continue
        size = len(lines)
        same = run.config.get("REWARDS") == first.config.get("REWARDS")
        for figure in _shared(runs):
            if figure in ("reward", "reward_fixed_scale", "eval/reward") and not same:
                continue
            if found := paired(first, run, figure):
                mean, half, steps = found
                low, high = mean - half, mean + half
                verdict = "higher" if low > 0 else "lower" if high < 0 else "no difference shown"
                interval = f"[{number(low)}, {number(high)}]"
                lines.append([name, _label(figure), str(steps), number(mean), interval, verdict])
        if len(lines) == size:
            short.append(name)
    notes = []
    if lines:
        notes.append(
            f"Each run less {first_name}, step by step, on the same prompts. The interval is that "
            f"of the means of {BLOCKS} blocks of steps: it is of this seed, not of others."
        )
    if short:
        be = "is" if len(short) == 1 else "are"
        notes.append(
            f"{', '.join(short)} {be} not compared step by step: that needs at least {2 * BLOCKS} "
            "steps in both runs."
        )
    heads = ["run", "figure", "steps", "difference", "95 % interval", "verdict"]
    return Table(heads, lines), " ".join(notes + unpaired)


def _verdict(runs: Runs) -> str:
    """Which run ends with the highest reward, where that is beyond the noise of its last steps."""
    if lost := [name for name, run in runs.items() if not run.config]:
        return f"The rewards are not compared: the keys of {', '.join(lost)} are not known."
    rewards = [run.config.get("REWARDS") for run in runs.values()]
    if any(each != rewards[0] for each in rewards):
        return "The runs have different REWARDS, so their rewards are not compared."
    measured = {run.reward for run in runs.values()}
    reward = measured.pop() if len(measured) == 1 else "reward"
    ends = {name: run.values(reward)[-LAST:] for name, run in runs.items()}
    if min(map(len, ends.values())) < 5:
        return "The runs are too short to be compared."
    first, second = sorted(ends, key=lambda name: -statistics.mean(ends[name]))[:2]
    seen = change(ends[second], ends[first])
    said = f"{number(seen.last)} against {number(seen.first)} (± {number(seen.error, 2)})"
    steps = {name: reached(run) for name, run in runs.items()}
    each = ", ".join(f"{name} {count}" for name, count in steps.items())
    lengths = f" The runs are not equally long, in steps: {each}." * (len({*steps.values()}) > 1)
    if seen.z > 3:
        return f"{first} ends with the highest reward, {said} of {second}.{lengths}"
    return f"No run ends with a higher reward than the others beyond its noise: {said}.{lengths}"


def _charts(runs: Runs) -> list[Chart]:
    def curves(figure: str, smooth: bool = True) -> list[Series]:
        return [Series(name, run.series(figure), smooth=smooth) for name, run in runs.items()]

    made = [
        chart(_label(figure).capitalize().replace("_", " "), curves(figure))
        for figure in _shared(runs)
    ]
    frontier = chart(
        "Reward by KL",
        [Series(name, frontier_of(run), smooth=False) for name, run in runs.items()],
        x_name="nats",
        unit="smoothed; to the right, further from the first policy",
        note="At the same KL, the higher curve is the better one.",
    )
    made.insert(1, frontier)
    made.append(chart("Learning rate", curves("lr", smooth=False), log=True))
    return [each for each in made if each]


def frontier_of(run: Run) -> list[tuple[float, float]]:
    """(KL per completion, reward), both smoothed, of each step, in the order of the steps."""
    known = [
        (row["kl_per_completion"], row["reward"])
        for row in run.metrics
        if row.get("kl_per_completion") is not None and row.get("reward") is not None
    ]
    if not known:
        return []
    kl, reward = (smoothed(column) for column in zip(*known, strict=True))
    return list(zip(kl, reward, strict=True))
