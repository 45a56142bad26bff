"""Tables and a plot of what lr_robustness.py measured: interquartile means, intervals."""

import random
import statistics
from pathlib import Path
from typing import Any

from lr_methods import METHODS, ONLINE, OURS, START


def middle(scores: list[float]) -> float:
    """The interquartile mean: of five, the middle three."""
    cut = len(scores) // 4
    return statistics.mean(sorted(scores)[cut : len(scores) - cut])


def interval(scores: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 %, by drawing seeds with replacement."""
    chance = random.Random(0)
    found = sorted(middle(chance.choices(scores, k=len(scores))) for _ in range(draws))
    return found[int(0.025 * draws)], found[int(0.975 * draws) - 1]


def score_of(row: dict[str, Any], floor: float) -> float:
    """A policy without finite probabilities has no score; it counts as the worst there was."""
    return floor if row["score"] is None else row["score"]


def report(rows: list[dict[str, Any]]) -> str:
    """Tables in Markdown."""
    lines: list[str] = []
    shares: dict[float, list[float]] = {rate: [] for rate in START}
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        floor = min(row["score"] for row in own if row["score"] is not None)
        start = middle([r["score"] for r in own if (r["method"], r["rate"]) == ("constant", 1e-7)])
        cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for row in own:
            cells.setdefault((row["method"], row["rate"]), []).append(row)

        def iqm(key: tuple[str, float], cells: Any = cells, floor: float = floor) -> float:
            return middle([score_of(row, floor) for row in cells[key]])

        def fell(row: dict[str, Any], start: float = start) -> bool:
            return row["score"] is None or row["entropy"] < 0.1 or row["score"] < start - 0.1

        lines += [
            f"### {task}",
            "",
            f"Untrained: {start:.3f}.",
            "",
            "| method | best rate | score there [95 %] | KL | worst rate tried | score there "
            "| collapsed | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        bests = {}
        for method in METHODS:
            keys = sorted((key for key in cells if key[0] == method), key=iqm)
            if not keys:
                continue
            best, worst = keys[-1], keys[0]
            bests[method] = iqm(best), middle([row["kl"] for row in cells[best]])
            low, high = interval([score_of(row, floor) for row in cells[best]])
            all_runs = [row for key in keys for row in cells[key]]
            lines.append(
                f"| {method} | {best[1]:g} | {iqm(best):.3f} [{low:.3f}, {high:.3f}] "
                f"| {bests[method][1]:.1f} | {worst[1]:g} | {iqm(worst):.3f} "
                f"| {sum(map(fell, all_runs))} of {len(all_runs)} "
                f"| {statistics.median(row['seconds'] for row in all_runs):.1f} |"
            )
        rivals = {m: b for m, b in bests.items() if not m.startswith(OURS)}
        rival = max(rivals, key=lambda method: rivals[method][0])
        lines += [
            "",
            f"`trust_region` by start rate, beside the best baseline ({rival}, "
            f"{rivals[rival][0]:.3f} at a KL of {rivals[rival][1]:.1f}):",
            "",
            "| start rate | score [95 %] | of the best | KL |",
            "|---|---|---|---|",
        ]
        for rate in START:
            runs = cells["trust_region", rate]
            low, high = interval([score_of(row, floor) for row in runs])
            share = iqm(("trust_region", rate)) / rivals[rival][0]
            shares[rate].append(share)
            lines.append(
                f"| {rate:g} | {iqm(('trust_region', rate)):.3f} [{low:.3f}, {high:.3f}] "
                f"| {share:.1%} | {middle([row['kl'] for row in runs]):.1f} |"
            )
        lines.append("")
    mean = [statistics.mean(share) for share in shares.values()]
    lines.append(
        f"Mean over tasks and start rates: {statistics.mean(mean):.1%} of each task's best "
        f"baseline; the worst start rate has {min(mean):.1%}."
    )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(4 * len(names), 4), layout="constrained")
    colours = dict(zip(METHODS, [f"C{k}" for k in range(10)] + ["olive", "navy"] * 5, strict=False))
    for axes, task in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for method in METHODS:
            if method.startswith("placebo") or len(METHODS[method][1]) < 3:
                continue  # Prodigy's rate is another thing
            points = {}
            for rate in METHODS[method][1]:
                scores = [
                    max(score_of(row, -9.0), -0.5)
                    for row in rows
                    if (row["task"], row["method"], row["rate"]) == (task, method, rate)
                ]
                if scores:
                    points[rate] = middle(scores)
            style: dict[str, Any] = {"linewidth": 1, "marker": ".", "color": colours[method]}
            if method == "trust_region":
                style = {"linewidth": 3, "marker": "o", "color": "black", "zorder": 3}
            axes.plot(list(points), list(points.values()), label=method, **style)
        axes.set(xscale="log", xlabel="start rate", title=task)
    figure.axes[0].set_ylabel("score, at least −0.5")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right")
    figure.savefig(path, dpi=110)


def report_collapse(rows: list[dict[str, Any]]) -> str:
    """How many runs ended below the untrained policy, or with a broken one."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        start = statistics.mean(row["trace"][0] for row in own)
        fell = [row for row in own if row["score"] is None or row["score"] < start - 0.1]
        rates = [row["rate"] for row in own]
        lines.append(
            f"{task}: {len(fell)} of {len(own)} runs from rates of {min(rates):g} to "
            f"{max(rates):g} ended 0.1 below the untrained policy ({start:.3f}); the mean score is "
            f"{statistics.mean(score_of(row, -5.0) for row in own):.3f}."
        )
    return "\n\n".join(lines) + "\n"


# What each online method is compared with: trust_region is around AdamW, of another day
BESIDE = {"OnlineMini": ("AdamMini", 1e-3)}
PLAIN = ("trust_region", 1e-4)


def report_online(rows: list[dict[str, Any]]) -> str:
    """Each method's score, and its difference to the plain optimizer, seed by seed."""
    lines, tasks = [], list(dict.fromkeys(row["task"] for row in rows))
    scores: dict[tuple[str, str, float], dict[int, float]] = {}
    for row in rows:
        own = scores.setdefault((row["task"], row["method"], row["rate"]), {})
        own[row["seed"]] = -1.0 if row["score"] is None else row["score"]
    plain = {PLAIN, *BESIDE.values()}

    def differences(task: str, method: str, rate: float) -> list[float]:
        other = scores.get((task, *BESIDE.get(method, PLAIN)), {})
        found = scores.get((task, method, rate), {})
        return [score - other[seed] for seed, score in found.items() if seed in other]

    def beside(method: str) -> str:
        return BESIDE.get(method, PLAIN)[0]

    for task in tasks:
        head = "| | score | compared with | difference [95 %] |"
        lines += ["", f"### {task}", "", head, "|---|---|---|---|"]
        for method, (_, rates) in ONLINE.items():
            for rate in rates:
                found = scores.get((task, method, rate))
                if not found:
                    continue
                name = method if len(rates) == 1 else f"{method}, from {rate:g}"
                told = "| | |"
                if (method, rate) not in plain:
                    more = differences(task, method, rate)
                    low, high = interval(more)
                    told = f"| {beside(method)} | {middle(more):+.3f} [{low:+.3f}, {high:+.3f}] |"
                lines.append(
                    f"| {name} ({len(found)} seeds) | {middle([*found.values()]):.3f} {told}"
                )
    head = "| | compared with | mean difference [95 %] |"
    lines += ["", "### All tasks", "", head, "|---|---|---|"]
    for method, (_, rates) in ONLINE.items():
        more = [each for task in tasks for each in differences(task, method, rates[0])]
        if (method, rates[0]) in plain or len(rates) > 1 or not more:
            continue
        low, high = interval(more)
        told = f"{middle(more):+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append(f"| {method} | {beside(method)} | {told} |")
    return "\n".join(lines).strip() + "\n"
