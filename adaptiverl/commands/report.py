"""`adaptiverl report RUN`: one HTML file on a run, from its folder alone, also while it runs."""

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import to_jsonable_python

from adaptiverl.commands.charts import number, rounded
from adaptiverl.commands.curves import FIXED, Run, ends, read_run
from adaptiverl.commands.doctor import end_ids, findings, model_config
from adaptiverl.commands.endings import in_words, lost, missing, outcome, reached
from adaptiverl.commands.explain import factor, hyperparameters, movers, used_from
from adaptiverl.commands.kept_samples import kept_samples
from adaptiverl.commands.pages import write_page
from adaptiverl.commands.report_charts import evaluated_on, report_charts
from adaptiverl.commands.sample_facts import SampleFacts, facts_of
from adaptiverl.commands.verdict import verdict
from adaptiverl.rl.chat import readable
from adaptiverl.training.keys import RunConfig

EVENTS = 200  # that are listed, at most
CHANGES = 3000  # of hyperparameters, at most; the largest stay


class PartOfTime(NamedTuple):
    name: str
    seconds: float
    per_step: float
    share: float


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes `out`, report.html in the folder if it is None; where it is."""
    run = read_run(folder)
    facts = facts_of(run, end_ids(run))
    found = findings(run, facts)
    kept = kept_samples(run, facts)
    charts, progress, times = report_charts(run), _progress(run), _times(run)
    changed, defaults = _keys(run)
    title = folder.resolve().name
    sections = [
        ("health", "What is wrong", True),
        ("curves", "Curves", charts),
        ("progress", "Before and after", progress),
        ("samples", "Samples", kept.rows),
        ("events", "Events", True),
        ("config", "Config and time", True),
    ]
    values = {
        "name": title,
        "verdict": verdict(run, found),
        "subtitle": _subtitle(run, times),
        "tiles": _tiles(run),
        "sections": [(id, name) for id, name, there in sections if there],
        "found": found,
        "charts": charts,
        "curves_note": "Bold lines are smoothed, faint ones are each step's. Point at a curve for "
        "its value.",
        "progress": progress,
        "samples": {
            "caption": "Completions with their rewards",
            "columns": kept.columns,
            "kinds": ["n", "", "prompt", "text", *["n"] * (len(kept.columns) - 4)],
            "rows": kept.rows,
            "note": kept.note,
            "sort": 4,
            "filters": [
                ("Which", 1, ["best", "worst", "random", "other"]),
                ("Step", 0, kept.steps),
            ],
        },
        "events": _events(run)[:EVENTS],
        "movers": [(name, movers(run, name)) for name in hyperparameters(run)],
        "changes": _changes(run),
        "changed": changed,
        "defaults": defaults,
        "times": times,
        "times_summary": ", ".join(f"{each.name} {each.share:.0%}" for each in times),
        "environment": _environment(run, facts),
        "left_out": _left_out(run),
    }
    return write_page("report.html", out or folder / "report.html", values)


def _events(run: Run) -> list[tuple[str, str, str]]:
    """Step, kind and message; it is said of steps that a rollback took back."""
    to = [change["step"] - 1 for change in run.changes if change["rule"] == "rollback"]
    at = [place for place, each in enumerate(run.events) if each["action"] == "rollback"]
    rows = []
    for place, each in enumerate(run.events):
        gone = any(
            place <= later and each["step"] > step for later, step in zip(at, to, strict=False)
        )
        rows.append((f"step {each['step']}{', taken back' * gone}", each["kind"], each["message"]))
    return rows


def _subtitle(run: Run, times: list[PartOfTime]) -> str:
    parts = [f"step {reached(run)} of {run.config.get('STEPS', '?')}", outcome(run)]
    if gone := lost(run):
        parts.append(f"metrics.jsonl lacks {in_words(gone)}")
    parts += missing(run)
    if seconds := sum(each.seconds for each in times):
        minutes = f"{seconds / 60:.1f} minutes" if seconds > 120 else f"{seconds:.0f} seconds"
        parts.append(f"{minutes} of steps")
    if speeds := run.values("tokens_per_second"):
        parts.append(f"{statistics.median(speeds):,.0f} tokens per second")
    return " · ".join(parts)


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(what, its value at last, which steps that is of and how it began): as explain says it."""
    named = [(run.reward, "Reward", "" if run.reward == "reward" else FIXED)]
    named += [(name, name.split("/")[2], "held out") for name in run.names("held_out/", "/mean")]
    named += [
        ("kl_per_completion", "KL", "nats per completion"),
        ("entropy", "Entropy", "nats per token"),
        ("completions/mean_length", "Length", "tokens"),
        ("eval/reward", "Evaluation", f"on {evaluated_on(run)}"),
    ]
    tiles = []
    for name, label, unit in named:
        if not (known := run.values(name)):
            continue
        what = "evaluation" if name.startswith("eval/") else "step"
        if seen := run.change(name):
            many = len(ends(run, name)[1])
            more = f"mean of the last {many} {what}s, {number(seen.first)} of the first"
            last = seen.last
        else:
            last, more = known[-1], f"in the last {what}, {number(known[0])} in the first"
        tiles.append((label, number(last), more + (f", {unit}" if unit else "")))
    return tiles


def _progress(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each prompt with its completions in order."""
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    last = max((row["step"] for row in run.progress), default=0)
    for row in run.progress:
        step = row["step"]
        when = "before the first step" if not step else f"after step {step}"
        when += " (the last)" if step == last == reached(run) and run.state == "finished" else ""
        by_prompt.setdefault(readable(row["prompt"]), []).append((when, row["completion"]))
    return list(by_prompt.items())


def _changes(run: Run) -> dict[str, Any]:
    """Every change of a hyperparameter, as the controller wrote it down."""
    kept, count = run.changes, len(run.changes)
    if count > CHANGES:
        kept = sorted(kept, key=lambda change: -abs(factor(change)))[:CHANGES]
        kept = sorted(kept, key=lambda change: change["step"])
    rows = [
        [
            used_from(each),
            each["hyperparameter"],
            each["rule"],
            rounded(each["old"]),
            rounded(each["new"]),
            f"{each['signal']} {number(each['value'])}",
        ]
        for each in kept
    ]
    note = f"Every change of a hyperparameter: {count:,}."
    if count > len(rows):
        note = f"The largest {len(rows):,} of {count:,} changes; controller.jsonl has them all."
    return {
        "caption": "Changes of hyperparameters",
        "columns": ["from step", "hyperparameter", "rule", "from", "to", "because of"],
        "kinds": ["n", "", "", "n", "n", ""],
        "rows": rows,
        "note": note,
    }


def _keys(run: Run) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The keys of the config that were changed, and those at their defaults."""
    changed, defaults = list[tuple[str, str]](), list[tuple[str, str]]()
    for key, value in run.config.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        field = RunConfig.model_fields.get(key)
        same = field and not field.is_required() and to_jsonable_python(field.default) == value
        (defaults if same or key == "$schema" else changed).append((key, text))
    return changed, defaults


def _times(run: Run) -> list[PartOfTime]:
    sums = {name.removeprefix("seconds/"): sum(run.values(name)) for name in run.names("seconds/")}
    total, steps = sum(sums.values()), len(run.metrics)
    return [
        PartOfTime(name, seconds, seconds / steps, seconds / total)
        for name, seconds in sums.items()
        if total
    ]


def _environment(run: Run, facts: SampleFacts) -> list[tuple[str, str]]:
    model = model_config(run.path / name for name in run.checkpoints)
    rows = [
        ("folder", str(run.path)),
        ("model", str(run.config.get("MODEL", "?"))),
        ("architecture", model.get("model_type")),
        ("transformers", model.get("transformers_version")),
        (
            "weights",
            "16-bit autocast"
            if run.config.get("BF16") or run.config.get("FP16")
            else model.get("dtype"),
        ),
        ("checkpoints", ", ".join(f"{k} (step {v})" for k, v in run.checkpoints.items()) or "none"),
        ("completions", f"{facts.count:,} written down, of {len(facts.prompts):,} prompts"),
    ]
    return [(what, str(value)) for what, value in rows if value]


def _left_out(run: Run) -> str:
    left = []
    if len(run.metrics) > 200:
        left.append("Curves are thinned to 200 points.")
    if len(run.events) > EVENTS:
        left.append(f"The first {EVENTS} of {len(run.events)} events are listed.")
    return " ".join(left)
