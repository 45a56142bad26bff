"""What moved the learning rate of a run, when, and by how much: in words and a picture."""

import math
import statistics
from collections import defaultdict
from pathlib import Path

from adaptiverl.config.schema import ConfigError
from adaptiverl.files.logs import Row, read_rows
from adaptiverl.optim.rules import reason


def explain(folder: Path) -> str:
    """The report on the run in `folder`, and lr_vs_reward.png there."""
    metrics = _rows(folder / "metrics.jsonl")
    if not metrics:
        raise ConfigError(f"{folder / 'metrics.jsonl'} has no step yet")
    changes = _rows(folder / "controller.jsonl")
    lines = [f"{folder}: steps {metrics[0]['step']} to {metrics[-1]['step']}"]
    lines += _ends("reward", metrics, "{:.3f}")
    lines += [line for name in _held_out(metrics) for line in _ends(name, metrics, "{:.3f}")]
    lines += _parted(metrics)
    if "kl" in metrics[0]:
        lines += _ends("kl", metrics, "{:.4f}")
    rates = [(row["lr"], row["step"]) for row in metrics]
    (low, at_low), (high, at_high) = min(rates), max(rates)
    lines.append(
        f"rate         {rates[0][0]:.3g} at first, {rates[-1][0]:.3g} at last; "
        f"lowest {low:.3g} (step {at_low}), highest {high:.3g} (step {at_high})"
    )
    if metrics[-1].get("skipped"):
        lines.append(f"skipped      {metrics[-1]['skipped']} steps: their gradient was not finite")
    for name in dict.fromkeys(change["hyperparameter"] for change in changes):
        own = [change for change in changes if change["hyperparameter"] == name]
        lines += ["", *_movers(name, own)]
    if not changes:
        lines += ["", "nothing moved the rate or any other hyperparameter"]
    _plot(metrics, changes, folder / "lr_vs_reward.png")
    return "\n".join([*lines, "", f"plot: {folder / 'lr_vs_reward.png'}"])


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name the folder that a run was written to")
    return read_rows(path)


def _ends(name: str, metrics: list[Row], form: str) -> list[str]:
    """Means over the first and the last ten steps, of those that are known."""
    texts = []
    for part in (metrics[:10], metrics[-10:]):
        known = [row[name] for row in part if row.get(name) is not None]
        texts.append(form.format(sum(known) / len(known)) if known else "missing")
    return [f"{name:12} {texts[0]} in the first ten steps, {texts[1]} in the last ten"]


def _held_out(metrics: list[Row]) -> list[str]:
    return [name for name in metrics[0] if name.startswith("held_out/") and name.endswith("/mean")]


def _parted(metrics: list[Row]) -> list[str]:
    """A warning for each held-out reward that fell, beyond its noise, while the reward rose."""
    rise = _rise(metrics, "reward")
    return [
        f"WARNING      the reward rose by {rise:.1f} standard errors and {name} fell by "
        f"{-_rise(metrics, name):.1f}: the reward may be gamed; read samples.jsonl"
        for name in _held_out(metrics)
        if rise > 2 and _rise(metrics, name) < -2
    ]


def _rise(metrics: list[Row], name: str) -> float:
    """From the first to the last third, in standard errors of the difference; 0 if unknown."""
    known = [row[name] for row in metrics if row.get(name) is not None]
    size = len(known) // 3
    if size < 3:
        return 0.0
    first, last = known[:size], known[-size:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / size)
    return (statistics.mean(last) - statistics.mean(first)) / error if error else 0.0


def _movers(name: str, changes: list[Row]) -> list[str]:
    """Each rule that moved the hyperparameter `name`, and the three largest changes."""
    by_rule = defaultdict(list)
    for change in changes:
        by_rule[change["rule"]].append(change)
    lines = [f"What moved {name}:"]
    for rule, own in by_rule.items():
        total = math.exp(sum(_size(change) for change in own))
        steps = ", ".join(str(change["step"]) for change in own[:5])
        steps += ", …" if len(own) > 5 else ""
        why = reason(rule, name)
        lines.append(f"  {rule:15} × {total:.3g} in {len(own)} steps ({steps}): {why}")
    lines.append("Its largest changes:")
    largest = sorted(changes, key=lambda change: -abs(_size(change)))[:3]
    for change in sorted(largest, key=lambda change: change["step"]):
        seen = f"{change['signal']} {change['value']:.3g}"
        moved = f"{change['old']:.3g} → {change['new']:.3g}"
        lines.append(f"  step {change['step']:<6} {moved:24} {change['rule']}, {seen}")
    return lines


def _size(change: Row) -> float:
    """The logarithm of the factor, 0 where that makes no sense."""
    old, new = change["old"], change["new"]
    return math.log(new / old) if old > 0 and new > 0 else 0.0


def _plot(metrics: list[Row], changes: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure  # half a second

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in metrics]
    above.plot(steps, [math.nan if row["reward"] is None else row["reward"] for row in metrics])
    above.set_ylabel("reward")
    below.plot(steps, [row["lr"] for row in metrics], color="C1")
    below.set(yscale="log", ylabel="learning rate", xlabel="step")
    scaled = [row["step"] for row in metrics if row.get("update_scale", 1.0) < 1]
    for step in scaled:
        below.axvline(step, color="0.8", linewidth=1, zorder=0)
    if scaled:
        below.set_title(
            "grey: the line search made the update smaller", loc="right", fontsize="small"
        )
    figure.savefig(path, dpi=120)
