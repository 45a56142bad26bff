"""The picture of README: `train.py config.json` from three learning rates, beside constant ones.

    python benchmarks/rates.py [--out benchmarks/rates.json] [--picture docs/rates.png] [--draw]

Constant rates are AdamW's, with no rule and no rollback. All runs have the same prompts and random
numbers; nothing else is changed. One random seed. `--draw` only draws what was measured.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CONSTANT = ["OPTIM=adamw", "LR_RULE=none", "ON_COLLAPSE=warn"]
RUNS = [
    *[(f"constant {rate}", [f"LRATE={rate}", *CONSTANT]) for rate in ("1e-5", "1e-4", "3e-4")],
    *[(f"constant {rate}", [f"LRATE={rate}", *CONSTANT]) for rate in ("1e-3", "1e-2")],
    *[(f"default, from {rate}", [f"LRATE={rate}"]) for rate in ("1e-7", "auto", "1")],
]


def one_run(overrides: list[str]) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "config.json", *overrides, "REPORT=false"]
        command += [f"OUTPUT_DIR={folder}", "SAVE_EVERY=0"]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    return {key: [round(row[key], 4) for row in rows] for key in ("reward", "kl_per_completion")}


def smooth(values: list[float], steps: int = 5) -> list[float]:
    """Means over the last `steps` steps."""
    parts = [values[max(0, k - steps + 1) : k + 1] for k in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw(runs: dict[str, Any], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    constants = [name for name in runs if name.startswith("constant")]
    for name, run in runs.items():
        style: dict[str, Any] = {"color": "black", "linewidth": 1.8, "zorder": 3}
        style["linestyle"] = {"1e-7": ":", "1": "--"}.get(name.split()[-1], "-")
        if name in constants:
            share = constants.index(name) / max(len(constants) - 1, 1)
            style = {"color": colormaps["plasma"](0.1 + 0.75 * share), "linewidth": 1.2}
        steps = range(1, len(run["reward"]) + 1)
        left.plot(steps, smooth(run["reward"]), label=name, **style)
        right.plot(steps, [max(kl, 0.01) for kl in smooth(run["kl_per_completion"])], **style)
    left.set(xlabel="step", ylabel="reward, mean of 5 steps", ylim=(0, 1))
    right.set(xlabel="step", ylabel="KL to the start, nats per completion", yscale="log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "rates.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "rates.png")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    arguments = parser.parse_args()
    if not arguments.draw:
        machine = f"{os.cpu_count()} cores, {platform.machine()}"
        report: dict[str, Any] = {"date": str(datetime.date.today()), "machine": machine}
        report["runs"] = {name: one_run(overrides) for name, overrides in RUNS}
        arguments.out.write_text(json.dumps(report) + "\n")
    draw(json.loads(arguments.out.read_text())["runs"], arguments.picture)


if __name__ == "__main__":
    main()
