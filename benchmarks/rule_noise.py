"""What each rule does to the rate where all its signals are pure noise: 10,000 steps, five seeds.

    python benchmarks/rule_noise.py          writes rule_noise.json and rule_noise.md

Loss and reward are N(0, 1), the gradient's norm is the absolute value of one; all else is at its
default. The rate is given over where it began: its geometric mean (the range over the seeds), and
the lowest and the highest value of any seed. Two cores, a minute.
"""

import json
import math
import random
import sys
from multiprocessing import get_context
from pathlib import Path

import torch
from tabulate import tabulate

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from adaptiverl.optim.controller import Controller  # noqa: E402
from adaptiverl.optim.rules import RULES  # noqa: E402

NEED_KL = ("trust_region", "learned")  # without one they leave the rate alone
RATE_RULES = [
    (r.argument, r.name)
    for r in RULES
    if r.argument in ("lr_rule", "reward_rule") and r.name not in NEED_KL
]
RATE_RULES = list(dict.fromkeys(RATE_RULES))  # two of them are called trend: one moves the momentum
RATE_RULES.append(("lr_rule", "trend+variance+patience"))
SEEDS, STEPS, LRATE = range(5), 10_000, 0.01


def life(job: tuple[str, str, int]) -> tuple[float, float, float]:
    """The rate's geometric mean, lowest and highest."""
    kind, rule, seed = job
    chance = random.Random(seed)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LRATE, momentum=0.9)
    controller = Controller(optimizer, **{kind: rule})
    rates = []
    for _ in range(STEPS):
        controller.observe(
            loss=chance.gauss(0, 1), reward=chance.gauss(0, 1), grad_norm=abs(chance.gauss(0, 1))
        )
        controller.tick()
        rates.append(optimizer.param_groups[0]["lr"] / LRATE)
    return math.exp(sum(map(math.log, rates)) / len(rates)), min(rates), max(rates)


def main() -> None:
    jobs = [(kind, rule, seed) for kind, rule in RATE_RULES for seed in SEEDS]
    with get_context("spawn").Pool(2) as pool:
        lives = dict(zip(jobs, pool.map(life, jobs), strict=True))
    rows = []
    for kind, rule in RATE_RULES:
        own = [lives[kind, rule, seed] for seed in SEEDS]
        means, lows, highs = zip(*own, strict=True)
        rows.append(
            {"kind": kind, "rule": rule, "mean": [min(means), max(means)], "lowest": min(lows),
             "highest": max(highs)}
        )  # fmt: skip
    (HERE / "rule_noise.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = [
        [f"{row['kind']} {row['rule']}", "{:.2f} to {:.2f}".format(*row["mean"]),
         f"{row['lowest']:.2f}", f"{row['highest']:.2f}"]
        for row in rows
    ]  # fmt: skip
    text = tabulate(table, ["rule", "mean", "lowest", "highest"], "github", disable_numparse=True)
    (HERE / "rule_noise.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
