"""What moved in a run, when, and by how much, in words; report.py shows it as a page."""

import math
from collections import defaultdict
from pathlib import Path

from adaptiverl.commands.charts import number
from adaptiverl.commands.curves import SHORT, Row, Run, comparable, read_run, smoothed
from adaptiverl.commands.doctor import findings
from adaptiverl.commands.endings import in_words, lost, missing, outcome
from adaptiverl.commands.verdict import ERRORS, spans, verdict
from adaptiverl.config.schema import ConfigError
from adaptiverl.files.console import counted
from adaptiverl.optim.rules import reason


def explain(folder: Path) -> str:
    """The report on the run in `folder` as text."""
    run = read_run(folder)
    if not run.metrics:
        raise ConfigError(f"{folder / 'metrics.jsonl'} has no step yet")
    found = findings(run)
    steps = f"steps {run.metrics[0]['step']} to {run.step} of {run.config.get('STEPS', '?')}"
    lines = [f"{folder}: {steps}, {outcome(run)}", verdict(run, found), ""]
    if gone := lost(run):
        lines.append(f"lost         metrics.jsonl lacks {in_words(gone)}")
    lines += [f"missing      {said}" for said in missing(run)]
    if (count := len(run.metrics)) < SHORT:
        lines.append(f"short        {counted(count, 'step')}; from {SHORT} on, means say more")
    named = [
        *dict.fromkeys(["reward", run.reward]),
        *(run.names("rewards/", "/mean") if len(run.rewards) > 1 else []),
    ]
    named += run.names("held_out/rewards/", "/mean")
    named += ["kl", "kl_per_completion", "entropy", "completions/mean_length", "eval/reward"]
    ends = [line for name in named if name in run.names("") for line in _ends(run, name)]
    lines += ends
    if "±" not in lines[1] and any("±" in line for line in ends):
        lines.append(f"±            {ERRORS.removeprefix('± is ')}")
    if known := comparable(run, run.reward):
        smooth = smoothed([value for _, value in known])
        best = max(range(len(smooth)), key=smooth.__getitem__)
        lines.append(
            f"highest      {run.reward} {smooth[best]:.3f} around step {known[best][0]}, smoothed"
        )
    lines += [f"WARNING      {each.says}: {each.evidence}" for each in found]
    lines += _rates(run)
    for name in hyperparameters(run):
        lines += ["", f"What moved {name}:", *("  " + line for line in movers(run, name))]
        lines += ["Its largest changes:", *("  " + line for line in largest(run, name))]
    if not run.changes and (folder / "controller.jsonl").exists():
        lines += ["", "nothing moved the rate or any other hyperparameter"]
    return "\n".join([*lines, "", f"with curves: adaptiverl report {folder}"])


def _ends(run: Run, name: str) -> list[str]:
    """Means over the first and the last steps that are known, with their standard error."""
    known = comparable(run, name)
    if not known:
        return [f"{name:12} missing in all steps"]
    seen = run.change(name)
    if seen is None:
        ends = known[:1] + known[1:][-1:]
        return [f"{name:12} " + ", ".join(f"{value:.4g} in step {step}" for step, value in ends)]
    first, last = spans(run, name)
    return [
        f"{name:12} {seen.first:.4g} in {first}, {seen.last:.4g} in {last} "
        f"(± {number(seen.error, 2)})"
    ]


def _rates(run: Run) -> list[str]:
    rates = [(rate, step) for step, rate in run.series("lr")]
    if not rates:
        return ["rate         missing in all steps"]
    low, at_low = min(rates)
    high, at_high = max(rates, key=lambda rate: (rate[0], -rate[1]))  # the first of equal ones
    lines = [
        f"rate         {rates[0][0]:.3g} at first, {rates[-1][0]:.3g} at last; "
        f"lowest {low:.3g} (step {at_low}), highest {high:.3g} (step {at_high})"
    ]
    if run.metrics[-1].get("skipped"):
        steps = counted(run.metrics[-1]["skipped"], "step")
        lines.append(f"skipped      {steps}, of a gradient that was not finite")
    return lines


def hyperparameters(run: Run) -> list[str]:
    """Those that were moved."""
    return list(dict.fromkeys(change["hyperparameter"] for change in run.changes))


def movers(run: Run, name: str) -> list[str]:
    """Each rule that moved the hyperparameter `name`, by how much in all, and why."""
    by_rule = defaultdict(list)
    for change in _used(run, name):
        up = change["rule"] == "line_search" and factor(change) > 0
        by_rule[change["rule"] + " up" * up].append(change)
    lines = []
    for rule, own in by_rule.items():
        total = math.exp(sum(factor(change) for change in own))
        at = list(dict.fromkeys(map(used_from, own)))  # several rollbacks may be to one step
        steps = ", ".join(map(str, at[:5])) + ", …" * (len(at) > 5)
        when = f"step {steps}" if len(at) == 1 else f"{len(at)} steps ({steps})"
        lines.append(f"{rule:15} × {total:.3g} in {when}{_why(rule, name)}")
    return lines


def _why(rule: str, name: str) -> str:
    """Nothing of a label that no rule of this version has."""
    try:
        return f": {reason(rule, name)}"
    except StopIteration:
        return ""


def largest(run: Run, name: str) -> list[str]:
    """The three largest changes of the hyperparameter `name`."""
    lines = []
    biggest = sorted(_used(run, name), key=lambda change: -abs(factor(change)))[:3]
    for change in sorted(biggest, key=used_from):
        # Not from old to new: where several rules move it, what one makes of it no step has seen.
        moved = f"× {math.exp(factor(change)):.3g}" if factor(change) else f"to {change['new']:.3g}"
        seen = f"{change['signal']} {change['value']:.3g}"
        lines.append(f"step {used_from(change):<6} {moved:10} {change['rule']}, {seen}")
    return lines


def used_from(change: Row) -> int:
    """The first step that had the new value.

    Rules of the time, and the trust region as it steers, move it after the step that they name.
    """
    after = change["signal"] == "time" or change["rule"] in ("trust_region", "min_lr", "learned")
    return change["step"] + after


def _used(run: Run, name: str) -> list[Row]:
    """The changes of `name`, without what the last step left for a step that has not been."""
    own = [change for change in run.changes if change["hyperparameter"] == name]
    return [change for change in own if used_from(change) <= run.step]


def factor(change: Row) -> float:
    """Its logarithm, 0 where that makes no sense."""
    old, new = change["old"], change["new"]
    return math.log(new / old) if old > 0 and new > 0 else 0.0
