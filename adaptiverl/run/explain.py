"""A run's folder in words and a picture: what moved the rate, when, and by how much."""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from adaptiverl.run.config import UserError

Row = dict[str, Any]
WHY = {
    "search": "the first update fell short of the KL target",
    "brake": "an update went too far and was made smaller before the next sample",
    "kl_target": "the KL of the last update was off its target",
    "loss_decay": "the loss is there",
    "trend": "the loss rose or fell by more than its noise",
    "patience": "the loss had stopped falling, or a drop had not helped",
    "variance": "the loss became noisier than usual, or calmer again",
    "grad_norm": "the gradient was longer than usual, or no longer",
    "reward trend": "the reward rose or fell by more than its noise",
    "reward variance": "the reward became noisier, or calmer again",
    "reward scaling": "the rate follows the reward",
    "reward kelly": "the rate bets on the reward",
}


def explain(folder: Path) -> str:
    """The report on the run in `folder`, and lr_vs_reward.png there."""
    metrics = _rows(folder / "metrics.jsonl")
    if not metrics:
        raise UserError(f"{folder / 'metrics.jsonl'} has no step yet")
    reasons = _rows(folder / "controller.jsonl")
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
    for what in dict.fromkeys(reason["what"] for reason in reasons):
        lines += ["", *_movers(what, [reason for reason in reasons if reason["what"] == what])]
    if not reasons:
        lines += ["", "nothing moved the rate or any other hyperparameter"]
    _plot(metrics, reasons, folder / "lr_vs_reward.png")
    return "\n".join([*lines, "", f"plot: {folder / 'lr_vs_reward.png'}"])


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        raise UserError(f"{path} does not exist: name the folder that a run was written to")
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the last is empty, or still being written


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


def _movers(what: str, reasons: list[Row]) -> list[str]:
    """Each rule that moved `what`, and the three largest changes."""
    by_rule = defaultdict(list)
    for reason in reasons:
        by_rule[reason["rule"]].append(reason)
    lines = [f"What moved {what}:"]
    for rule, own in by_rule.items():
        total = math.exp(sum(_change(reason) for reason in own))
        steps = ", ".join(str(reason["step"]) for reason in own[:5])
        steps += ", …" if len(own) > 5 else ""
        why = WHY.get(rule, "time passed" if own[0]["signal"] == "time" else "the loss changed")
        lines.append(f"  {rule:15} × {total:.3g} in {len(own)} steps ({steps}): {why}")
    lines.append("Its largest changes:")
    largest = sorted(reasons, key=lambda reason: -abs(_change(reason)))[:3]
    for reason in sorted(largest, key=lambda reason: reason["step"]):
        seen = f"{reason['signal']} {reason['seen']:.3g}"
        moved = f"{reason['old']:.3g} → {reason['new']:.3g}"
        lines.append(f"  step {reason['step']:<6} {moved:24} {reason['rule']}, {seen}")
    return lines


def _change(reason: Row) -> float:
    """Its logarithm, 0 where that makes no sense."""
    old, new = reason["old"], reason["new"]
    return math.log(new / old) if old > 0 and new > 0 else 0.0


def _plot(metrics: list[Row], reasons: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure  # half a second

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in metrics]
    above.plot(steps, [math.nan if row["reward"] is None else row["reward"] for row in metrics])
    above.set_ylabel("reward")
    below.plot(steps, [row["lr"] for row in metrics], color="C1")
    below.set(yscale="log", ylabel="learning rate", xlabel="step")
    braked = [reason["step"] for reason in reasons if reason["rule"] == "brake"]
    for step in braked:
        below.axvline(step, color="0.8", linewidth=1, zorder=0)
    if braked:
        below.set_title("grey: the brake", loc="right", fontsize="small")
    figure.savefig(path, dpi=120)
