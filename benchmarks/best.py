"""Whether best/ beats final/ by a reward that was held out, on runs that over-optimise.

    python benchmarks/best.py [--seeds 5] [--first 5] [--out benchmarks/best.json] [KEY=VALUE ...]

The reward is the share of words that praise, which "great." gets whole. What is meant is held out:
a classifier's probability of "positive", times distinct-2 of all completions that are evaluated
together: praise, said in many ways. The run goes too far because KL_COEF_TARGET allows 60 nats,
which lowers the penalty, at a rate without a trust region. eval/score charges KL_COEF as it is in
the config, and does not know what is meant. All are of the same prompts, the half of data.json that
is not trained on, and of the same random numbers.

A first measure, variety within each completion, was run on the seeds 0 to 4 and failed: best/ was
better in two of five (best_within.json, benchmarks/README.md). A policy that writes one fluent text
for all prompts met that measure. The one above was then chosen, tried on the seeds 100 and 101, and
this was predicted before the first of the seeds 5 to 9 was run: best/ is better in five seeds of
five, on average by more than 0.3.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from functools import cache
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from adaptiverl.config.loading import load_config  # noqa: E402
from adaptiverl.files.logs import read_rows  # noqa: E402
from adaptiverl.training.keys import RunConfig  # noqa: E402

HELD_OUT = "eval/held_out/rewards/meant/mean"
KEYS = {
    "MODEL": "benchmarks/policy-small",
    "TRAIN_FILE": "data.json",
    "EVAL_SPLIT": 0.5,
    "EVAL_EVERY": 4,
    "REWARDS": [{"TYPE": "python", "NAME": "praise", "FUNCTION": "benchmarks.best:praise"}],
    "HELD_OUT": [{"TYPE": "python", "NAME": "meant", "FUNCTION": "benchmarks.best:varied_praise"}],
    "BATCH_SIZE": 32,
    "NUM_GENERATIONS": 4,
    "MAX_NEW_TOKENS": 16,
    "KL_COEF": 0.1,
    "KL_COEF_TARGET": 60,
    "LR_RULE": "none",
    "LRATE": 1e-3,
    "ON_COLLAPSE": "warn",
    "STEPS": 60,
    "SAVE_EVERY": 0,
    "SAMPLES_EVERY": 0,
    "LOG_EVERY": 0,
}


PRAISE = {
    "great", "good", "best", "love", "loved", "excellent", "wonderful", "perfect", "amazing", "fun",
}  # fmt: skip


def praise(completions, **_) -> list[float]:
    """The share of words that are PRAISE."""
    words = [[word.strip(".,!?").lower() for word in text.split()] for text in completions]
    return [sum(word in PRAISE for word in each) / max(len(each), 1) for each in words]


@cache
def _sentiment():
    from rewards import ClassifierReward

    return ClassifierReward(model="adaptiverl/assets/sentiment", label="positive")


def varied_praise(prompts, completions, **_) -> list[float]:
    """P(positive) times distinct-2 of all `completions`; 0 for a text without words."""
    pairs = [pair for text in completions for pair in pairwise(text.split())]
    distinct = len(set(pairs)) / len(pairs) if pairs else 0.0
    praise = _sentiment()(prompts=prompts, completions=completions)
    return [
        (p or 0.0) * distinct if text.split() else 0.0
        for p, text in zip(praise, completions, strict=True)
    ]


def one_seed(seed: int, overrides: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "keys.json")
        config.write_text(json.dumps(KEYS))
        keys = [f"SEED={seed}", f"OUTPUT_DIR={folder}/run", *overrides]
        status = train.main((load_config(config, keys, schema=RunConfig), False))
        assert status == 0, status
        rows = read_rows(Path(folder, "run/metrics.jsonl"))
        best = json.loads(Path(folder, "run/best/best.json").read_text())
    evaluated = [row for row in rows if "eval/score" in row]
    final = evaluated[-1]
    assert final["step"] == rows[-1]["step"], "the last step is evaluated"
    names = ("step", "eval/reward", "eval/score", "eval/kl_per_completion", HELD_OUT)
    return {
        "seed": seed,
        "best": {name: best[name] for name in names},
        "final": {name: final[name] for name in names},
        "curve": [[row["step"], row["eval/score"], row[HELD_OUT]] for row in evaluated],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=5, help="the first seed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "best.json")
    arguments = parser.parse_args()
    runs = []
    print("seed  best step  held out: best  final  KL: best  final")
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        run = one_seed(seed, arguments.overrides)
        runs.append(run)
        best, final, kl = run["best"], run["final"], "eval/kl_per_completion"
        print(
            f"{seed:4}  {best['step']:9}  {best[HELD_OUT]:14.3f}  {final[HELD_OUT]:5.3f}  "
            f"{best[kl]:8.1f}  {final[kl]:5.1f}",
            flush=True,
        )
    gains = [run["best"][HELD_OUT] - run["final"][HELD_OUT] for run in runs]
    print(f"best/ is better in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds,", end=" ")
    print(f"by {statistics.mean(gains):.3f} on average")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    report = {"date": str(datetime.date.today()), "machine": machine, "gains": gains, "runs": runs}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
