"""Which regimes lr_robustness.py tries, which runs each has, and the table of their shares.

A share is (score − untrained) / (best constant − untrained): that of the gain of AdamW at the best
of three constant rates, with the same rewards, prompts and random numbers.
"""

import itertools
import statistics
from typing import Any, NamedTuple

from lr_methods import HALF_DECADES, REGIMES, START


class Regime(NamedTuple):
    """What a run is made of, beside the way its rate is set."""

    task: str
    batch: int  # completions per step
    steps: int
    lora: bool
    model: str


Runs = dict[tuple[Regime, str, float], list[dict[str, Any]]]
BASE = Regime("length", 32, 60, False, "small")
TASKS = ["length", "4 % hits", "1 % hits", "noisy", "hackable"]
ALL = [
    *[BASE._replace(task=task) for task in TASKS],
    *[BASE._replace(task=task, batch=8) for task in TASKS],
    *[BASE._replace(task=task, steps=15) for task in TASKS],
    BASE._replace(task="4 % hits", batch=8, steps=15),
    BASE._replace(task="1 % hits", batch=128),
    BASE._replace(task="noisy", batch=128, steps=15),
    BASE._replace(task="4 % hits", steps=200),
    *[BASE._replace(task=task, lora=True) for task in ("length", "4 % hits", "noisy")],
    *[BASE._replace(task=task, model="embedded") for task in ("4 % hits, embedded", "noisy")],
]
RULED = [BASE, BASE._replace(task="4 % hits"), BASE._replace(task="noisy")]  # where rules are tried
EVERYWHERE = ["trust_region", "constant", "ours: AdamW in the trust region"]
SEEDS, SEEDS_OF_RULES = range(3), range(1)
LEAST = 0.1  # gain of the best constant, of which a share says something


def rates_of(regime: Regime, method: str) -> list[float]:
    """Half-decades around where the best constant was expected; ten times as much for LoRA."""
    rates = REGIMES[method][1]
    if method != "constant":
        return rates
    lower = (regime.task == "noisy") - (regime.steps == 15)
    found = HALF_DECADES[1 - lower : 4 - lower]
    return [10 * rate for rate in found] if regime.lora else found


def cells() -> list[tuple[Regime, str, float, int]]:
    """The runs, seed by seed; a rate of 0 and one step judge the policies before training."""
    starts = dict.fromkeys(untrained(regime) for regime in ALL)
    return [(regime, "constant", 0.0, 0) for regime in starts] + [
        (regime, method, rate, seed)
        for seed, regime, method in itertools.product(SEEDS, ALL, REGIMES)
        if method in EVERYWHERE or (regime in RULED and seed in SEEDS_OF_RULES)
        for rate in rates_of(regime, method)
    ]


def untrained(regime: Regime) -> Regime:
    return BASE._replace(task=regime.task, model=regime.model, steps=1)


def regime_of(row: dict[str, Any]) -> Regime:
    """Rows of earlier versions are all of one regime."""
    return Regime(**{name: row.get(name, of_base) for name, of_base in BASE._asdict().items()})


def scores(rows: list[dict[str, Any]]) -> list[float]:
    """A policy without finite probabilities has no score; it counts as −5."""
    return [-5.0 if row["score"] is None else row["score"] for row in rows]


def shown(regime: Regime) -> str:
    more = ["LoRA"] * regime.lora + [regime.model] * (regime.model != BASE.model)
    return f"{regime.task.split(',')[0]}, {', '.join([f'{regime.batch} × {regime.steps}', *more])}"


def steps_to(row: dict[str, Any], level: float) -> int:
    """The first step at which the mean of five steps' scores reaches `level`; else one too many."""
    trace = row["trace"]
    means = [statistics.mean(trace[k : k + 5]) for k in range(len(trace) - 4)]
    return next((k + 5 for k, mean in enumerate(means) if mean >= level), len(trace) + 1)


def report_regimes(rows: list[dict[str, Any]]) -> str:
    """Tables in Markdown."""
    by: Runs = {}
    for row in rows:
        by.setdefault((regime_of(row), row["method"], row["rate"]), []).append(row)
    heads = [f"from {rate:g}" for rate in START]
    lines = [
        "| regime (batch × steps) | untrained | best constant | KL | "
        + " | ".join(heads)
        + " | KL | AdamW | steps to 90 %: constant, ours, AdamW | Σ KL of updates: ours, AdamW |",
        "|---|---|---|---|" + "---|" * len(heads) + "---|---|---|---|",
    ]
    shares: dict[float, list[float]] = {rate: [] for rate in START}
    by_constant: dict[float, list[float]] = {}
    collapsed = runs = 0
    little: list[str] = []
    for regime in ALL:
        constants = {
            rate: found
            for rate in rates_of(regime, "constant")
            if (found := by.get((regime, "constant", rate)))
        }
        own = {rate: found for rate in START if (found := by.get((regime, "trust_region", rate)))}
        if len(own) < len(START) or not constants:
            continue
        untrained = start_of(by, regime)
        best_rate = max(constants, key=lambda rate: statistics.mean(scores(constants[rate])))
        best = statistics.mean(scores(constants[best_rate]))
        gain = best - untrained
        if gain < LEAST:
            reached = ", ".join(f"{statistics.mean(scores(found)):.3f}" for found in own.values())
            little.append(
                f"| {shown(regime)} | {untrained:.3f} | {best:.3f} ({best_rate:g}) | {reached} |"
            )
            continue
        for rate, found in constants.items():
            scale = rate / 10 if regime.lora else rate
            share = (statistics.mean(scores(found)) - untrained) / gain
            by_constant.setdefault(scale, []).append(max(share, 0.0))
        cell = []
        for rate, found in own.items():
            values = [(score - untrained) / gain for score in scores(found)]
            shares[rate].append(statistics.mean(values))
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cell.append(f"{shares[rate][-1]:.0%} ± {error:.0%}")
            runs += len(found)
            collapsed += sum(score < untrained - 0.1 for score in scores(found))
        middle = own[START[1]]
        adamw = by.get((regime, "ours: AdamW in the trust region", 1e-3), [])
        level = untrained + 0.9 * gain

        def speed(found: list[dict[str, Any]], level: float = level) -> str:
            return (
                f"{statistics.median(steps_to(row, level) for row in found):.0f}" if found else "–"
            )

        def total(found: list[dict[str, Any]]) -> str:
            return f"{statistics.mean(row['sum_kl'] for row in found):.2f}" if found else "–"

        of_adamw = "–"
        if adamw:
            of_adamw = f"{(statistics.mean(scores(adamw)) - untrained) / gain:.0%}"
        far = statistics.mean(row["kl"] for row in middle if row["kl"] is not None)
        kl = statistics.mean(row["kl"] or 0.0 for row in constants[best_rate])
        lines.append(
            f"| {shown(regime)} | {untrained:.3f} | {best:.3f} ({best_rate:g}) | {kl:.1f} | "
            + " | ".join(cell)
            + f" | {far:.1f} | {of_adamw} | {speed(constants[best_rate])}, {speed(middle)}, "
            f"{speed(adamw)} | {total(middle)}, {total(adamw)} |"
        )
    every = [share for of_rate in shares.values() for share in of_rate]
    if not every:
        return "Nothing has been run.\n"
    good = sum(min(of_cell) >= 0.8 for of_cell in zip(*shares.values(), strict=True))
    tuned = max(by_constant, key=lambda rate: statistics.mean(by_constant[rate]))
    fixed = statistics.mean(by_constant[tuned])
    best_of_ours = [max(of_cell) for of_cell in zip(*shares.values(), strict=True)]
    phi = statistics.mean(best_of_ours) - max(statistics.mean(found) for found in shares.values())
    lines += [
        "",
        f"Mean share of the gain over {len(every) // len(START)} regimes and {len(START)} start "
        f"rates: {statistics.mean(every):.0%}, median {statistics.median(every):.0%}, lowest "
        f"{min(every):.0%}; in {good} regimes at least 80 % from every start rate. {collapsed} of "
        f"{runs} runs collapsed (ended 0.1 below the untrained policy).",
        "",
        "Sensitivity to the rate, Φ (Adkins et al. 2024): the share that is lost when one rate has "
        f"to serve all regimes. Constant AdamW: {1 - fixed:.2f} (the best single rate is "
        f"{tuned:g}; ten times that for LoRA). The trust region: {phi:.2f}.",
        "",
        f"Regimes in which no constant gains {LEAST:g}, left out above:",
        "",
        f"| | untrained | best constant | {', '.join(heads)} |",
        "|---|---|---|---|",
        *little,
        "",
        *rules(by),
    ]
    return "\n".join(lines) + "\n"


def start_of(by: Runs, regime: Regime) -> float:
    """The untrained policy's score, on the completions that all are judged by."""
    return scores(by[untrained(regime), "constant", 0.0])[0]


def rules(by: Runs) -> list[str]:
    """The library's rules, at the better of two rates, as shares of the gain."""
    lines = [
        "AdamW under the library's other rules, at their defaults, from 0.0001 and from 0.0003:",
        "",
        "| | " + " | ".join(shown(regime) for regime in RULED) + " |",
        "|---|" + "---|" * len(RULED),
    ]
    for method, (_, rates) in REGIMES.items():
        if not (method.startswith(("rule", "reward", "constant")) or "constant" in method):
            continue
        cell = []
        for regime in RULED:
            untrained = start_of(by, regime)
            constants = [
                statistics.mean(scores(by[regime, "constant", rate]))
                for rate in rates_of(regime, "constant")
                if (regime, "constant", rate) in by
            ]
            found = [
                statistics.mean(scores(by[regime, method, rate]))
                for rate in (rates if len(rates) == 2 else [1e-4, 3e-4])
                if (regime, method, rate) in by
            ]
            gain = max(constants) - untrained if constants else 1.0
            cell.append(", ".join(f"{(score - untrained) / gain:.0%}" for score in found) or "–")
        lines.append(f"| {method} | " + " | ".join(cell) + " |")
    return lines
