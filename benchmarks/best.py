"""Whether best/ beats final/ by a reward that was held out, on runs that over-optimise.

    python benchmarks/best.py [--seeds 5] [--out benchmarks/best.json] [KEY=VALUE ...]

The reward pays for the word "great", once per completion. What it is meant for is held out: the
classifier's probability of "positive", times the share of different words. At a constant rate that
is too large the policy finds " great great great". Both are of the same prompts, half of
data.json that is not trained on, and the same random numbers. best/ is chosen by eval/score, which
does not know the held-out reward.

Predicted before the first of these seeds was run: best/ is better in five seeds of five, on average
by more than 0.1.
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
    "EVAL_EVERY": 2,
    "REWARDS": [{"TYPE": "regex", "PATTERNS": "great"}],
    "HELD_OUT": [{"TYPE": "python", "NAME": "meant", "FUNCTION": "benchmarks.best:varied_praise"}],
    "BATCH_SIZE": 16,
    "NUM_GENERATIONS": 4,
    "MAX_NEW_TOKENS": 16,
    "KL_COEF": 0.05,
    "LR_RULE": "none",
    "LRATE": 1e-2,
    "ON_COLLAPSE": "warn",
    "STEPS": 20,
    "SAVE_EVERY": 0,
    "SAMPLES_EVERY": 0,
    "LOG_EVERY": 0,
}


@cache
def _sentiment():
    from rewards import ClassifierReward

    return ClassifierReward(model="adaptiverl/assets/sentiment", label="positive")


def varied_praise(prompts, completions, **_) -> list[float | None]:
    """P(positive) times the share of different words; missing where P(positive) is."""
    words = [text.split() for text in completions]
    varied = [len(set(each)) / len(each) if each else 0.0 for each in words]
    praise = _sentiment()(prompts=prompts, completions=completions)
    return [None if p is None else p * v for p, v in zip(praise, varied, strict=True)]


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
    parser.add_argument("--first", type=int, default=0, help="the first seed")
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
