"""`adaptiverl compare RUN RUN…`: what differs between runs, in their keys, figures and curves.

Each run is compared with the first. Where SEED and prompts agree, steps are paired.
"""

import json
import math
import statistics
from collections import Counter
from pathlib import Path

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
    f"Means over the last {LAST} steps that have a value, fewer in a shorter run. ± is one "
    "standard error."
)
OWN = {"OUTPUT_DIR", "$schema", "RESUME"}  # keys in which any two runs differ

Table = list[list[str]]


def compare(folders: list[Path], out: Path) -> str:
    """The tables as text, and the page `out`; raises ConfigError where there is one run alone."""
    if len(folders) < 2:
        raise ConfigError("compare needs two runs or more: adaptiverl compare RUN RUN")
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if not run.metrics:
            raise ConfigError(f"{run.path / 'metrics.jsonl'} has no step yet")
    hint = "name another file by --out"
    check_writable(out, hint)
    if out.exists() and not is_page(out):
        raise ConfigError(f"{out} exists and was not written by adaptiverl: {hint}")
    names = _names(folders)
    keys, figures = differing_keys(runs), _figures(runs)
    unknown = " ".join(f"{why}." for run in runs if (why := without_config(run)))
    short = [[_cut(text) for text in line] for line in keys]
    differences, note = _differences(runs, names)
    headers = {
        "figure_names": ["run", "steps", *(_label(name) for name in _shared(runs))],
        "difference_names": ["run", "figure", "steps", "difference", "95 % interval", "verdict"],
        "key_names": ["key", *(n for n, run in zip(names, runs, strict=True) if run.config)],
    }
    figures = [[name, *line] for name, line in zip(names, figures, strict=True)]
    values = {
        "names": names,
        "verdict": _verdict(runs, names),
        "keys": keys,
        "keys_note": unknown or ("" if keys else "None but OUTPUT_DIR."),
        "figures": figures,
        "figures_note": FIGURES_NOTE,
        "differences": differences,
        "differences_note": note,
        "charts": _charts(runs, names),
    }
    write_page("compare.html", out, headers | values)
    parts = [
        tabulate(short, headers["key_names"], disable_numparse=True)
        if keys
        else "no key differs" * (not unknown),
        unknown,
        tabulate(figures, headers["figure_names"], disable_numparse=True) + f"\n{FIGURES_NOTE}",
        tabulate(differences, headers["difference_names"], disable_numparse=True)
        if differences
        else "",
        note,
        f"with curves: {out}",
    ]
    return "\n\n".join(part for part in parts if part)


def differing_keys(runs: list[Run]) -> Table:
    """[key, its value in each run], of the keys that differ; without runs whose keys are lost."""
    runs = [run for run in runs if run.config]
    every = dict.fromkeys(key for run in runs for key in run.config if key not in OWN)
    rows = []
    for key in every:
        texts = [_text(run.config.get(key)) for run in runs]
        if len(set(texts)) > 1:
            rows.append([key, *texts])
    return rows


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


def are_paired(run: Run, other: Run) -> bool:
    """Whether both see the same prompts in the same steps; a file may have changed in between."""
    same_keys = all(run.config.get(key) == other.config.get(key) for key in PAIRED_BY)
    return bool(run.config and other.config) and same_keys and _have_same_prompts(run, other)


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


def _shared(runs: list[Run]) -> list[str]:
    """The figures that at least one run has; rewards and held-out ones that more than one has."""
    counts = Counter(
        name
        for run in runs
        for name in {*run.names("rewards/", "/mean"), *run.names("held_out/rewards/", "/mean")}
    )
    own = sorted(name for name, count in counts.items() if count > 1)
    return [name for name in (*FIGURES, *own) if any(run.values(name) for run in runs)]


def _label(name: str) -> str:
    return name.removeprefix("completions/").removesuffix("/mean").replace("rewards/", "")


def _figures(runs: list[Run]) -> Table:
    """What FIGURES_NOTE says."""
    table = []
    for run in runs:
        steps, known = reached(run), len(run.metrics)
        line = [str(steps) if known == steps else f"{known} of {steps}"]
        for name in _shared(runs):
            last = run.values(name)[-LAST:]
            text = number(statistics.mean(last)) if last else "—"
            if len(last) > 2:
                text += f" ± {number(statistics.stdev(last) / math.sqrt(len(last)), 2)}"
            line.append(text)
        table.append(line)
    return table


def _differences(runs: list[Run], names: list[str]) -> tuple[Table, str]:
    """Each run less the first, paired by step where that is right."""
    table: Table = []
    unpaired, short = list[str](), list[str]()
    for run, name in zip(runs[1:], names[1:], strict=True):
        if not are_paired(runs[0], run):
            unpaired.append(name)
            continue
        size = len(table)
        same = run.config.get("REWARDS") == runs[0].config.get("REWARDS")
        for figure in _shared(runs):
            if figure in ("reward", "reward_fixed_scale", "eval/reward") and not same:
                continue
            if found := paired(runs[0], run, figure):
                mean, half, steps = found
                low, high = mean - half, mean + half
                verdict = "higher" if low > 0 else "lower" if high < 0 else "no difference shown"
                interval = f"[{number(low)}, {number(high)}]"
                table.append([name, _label(figure), str(steps), number(mean), interval, verdict])
        if len(table) == size:
            short.append(name)
    notes = []
    if table:
        notes.append(
            f"Each run less {names[0]}, step by step, on the same prompts. The interval is that of "
            f"the means of {BLOCKS} blocks of steps: it is of this seed, not of others."
        )
    if short:
        be = "is" if len(short) == 1 else "are"
        notes.append(
            f"{', '.join(short)} {be} not compared step by step: that needs at least {2 * BLOCKS} "
            "steps in both runs."
        )
    for name in unpaired:
        run = runs[names.index(name)]
        lost = [own for own, each in ((names[0], runs[0]), (name, run)) if not each.config]
        if lost:
            of = " and of ".join(lost)
            notes.append(f"{name} is not compared step by step: the keys of {of} are not known.")
            continue
        keys = [key for key in PAIRED_BY if run.config.get(key) != runs[0].config.get(key)]
        other = ", ".join(keys) or "prompts"
        notes.append(f"{name} is not compared step by step: other {other}.")
    return table, " ".join(notes)


def _verdict(runs: list[Run], names: list[str]) -> str:
    """Which run ends with the highest reward, where that is beyond the noise of its last steps."""
    lost = [name for name, run in zip(names, runs, strict=True) if not run.config]
    if lost:
        return f"The rewards are not compared: the keys of {', '.join(lost)} are not known."
    if any(run.config.get("REWARDS") != runs[0].config.get("REWARDS") for run in runs):
        return "The runs have different REWARDS, so their rewards are not compared."
    reward = runs[0].reward if len({run.reward for run in runs}) == 1 else "reward"
    ends = {name: run.values(reward)[-LAST:] for name, run in zip(names, runs, strict=True)}
    if min(map(len, ends.values())) < 5:
        return "The runs are too short to be compared."
    first, second = sorted(ends, key=lambda name: -statistics.mean(ends[name]))[:2]
    seen = change(ends[second], ends[first])
    said = f"{number(seen.last)} against {number(seen.first)} (± {number(seen.error, 2)})"
    steps = {name: reached(run) for name, run in zip(names, runs, strict=True)}
    each = ", ".join(f"{name} {count}" for name, count in steps.items())
    lengths = f" The runs are not equally long, in steps: {each}." * (len({*steps.values()}) > 1)
    if seen.z > 3:
        return f"{first} ends with the highest reward, {said} of {second}.{lengths}"
    return f"No run ends with a higher reward than the others beyond its noise: {said}.{lengths}"


def _charts(runs: list[Run], names: list[str]) -> list[Chart]:
    pairs = list(zip(names, runs, strict=True))
    made = [
        chart(
            _label(figure).capitalize().replace("_", " "),
            [Series(name, run.series(figure)) for name, run in pairs],
        )
        for figure in _shared(runs)
    ]
    frontier = chart(
        "Reward by KL",
        [Series(name, frontier_of(run), smooth=False) for name, run in pairs],
        x_name="nats",
        unit="smoothed; to the right, further from the first policy",
        note="At the same KL, the higher curve is the better one.",
    )
    made.insert(1, frontier)
    made.append(
        chart(
            "Learning rate", [Series(n, r.series("lr"), smooth=False) for n, r in pairs], log=True
        )
    )
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
