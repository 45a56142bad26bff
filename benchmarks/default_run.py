"""The default run over several seeds: what it gains, what it costs, what it writes.

    python benchmarks/default_run.py [--seeds 5] [--out benchmarks/default_run.json] [KEY=VALUE ...]

For each seed: mean reward of the first and of the last ten steps, their difference in standard
errors (of a difference of two means of ten), KL to the start in nats per completion over the last
ten, and wall seconds of the whole command, imports included. One seed after the other.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def one_seed(seed: int, overrides: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"SEED={seed}", f"OUTPUT_DIR={folder}", *overrides]
        command = [sys.executable, "train.py", "config.json", *keys]
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
        samples = [json.loads(line) for line in (Path(folder) / "samples.jsonl").open()]
    first = [row["reward"] for row in rows[:10]]
    last = [row["reward"] for row in rows[-10:]]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / 10)
    gain = statistics.mean(last) - statistics.mean(first)
    return {
        "seed": seed,
        "first_ten": statistics.mean(first),
        "last_ten": statistics.mean(last),
        "gain_in_standard_errors": gain / error,
        "kl_per_completion": statistics.mean(row["kl_per_completion"] for row in rows[-10:]),
        "entropy": statistics.mean(row["entropy"] for row in rows[-10:]),
        "seconds": seconds,
        "first_samples": [row["prompt"] + row["completion"] for row in samples[:3]],
        "last_samples": [row["prompt"] + row["completion"] for row in samples[-12::4]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "default_run.json")
    arguments = parser.parse_args()
    runs = []
    print("seed  first ten  last ten  gain (s.e.)  KL/completion  seconds")
    for seed in range(arguments.seeds):
        run = one_seed(seed, arguments.overrides)
        runs.append(run)
        print(
            f"{seed:4}  {run['first_ten']:9.3f}  {run['last_ten']:8.3f}  "
            f"{run['gain_in_standard_errors']:11.1f}  {run['kl_per_completion']:13.2f}  "
            f"{run['seconds']:7.0f}",
            flush=True,
        )
    print("\n".join(["", *runs[0]["last_samples"]]))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    report = {"date": str(datetime.date.today()), "machine": machine, "runs": runs}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
