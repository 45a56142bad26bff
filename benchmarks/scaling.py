"""How this program's seconds and memory grow with batch, completion length and vocabulary.

    python benchmarks/scaling.py [--rounds 5] [--device cpu]

All sizes in turn, so that the machine's other load hits all alike; beside each, the floor of
sizes.py. Writes scaling.json and scaling.png.
"""

import json
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sizes import Size, build, floor, measure, memory_estimate
from throughput import best, header, need_tokenizer, options, shown
from workers import WARM_UP, Worker

BASE = Size("4x128", 4, 128, 4, 50257)
LINES = {
    "batch": (16, 32, 64, 128),
    "tokens": (16, 32, 64, 128),
    "vocab": (6282, 12564, 25128, 50257),
}


def scaling(device: str, rounds: int, tokenizer: Path) -> dict[str, Any]:
    """All points of LINES in turn, `rounds` times; no point twice a round."""
    base = replace(BASE, device=device)
    points = {
        field: [Size(**(asdict(base) | {field: x})) for x in xs] for field, xs in LINES.items()
    }
    distinct = dict.fromkeys(size for line in points.values() for size in line)
    workers, machines = {}, []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        for i, size in enumerate(distinct):
            folder = Path(name) / str(i)
            folder.mkdir()
            build(size, tokenizer, folder)
            workers[size] = Worker("ours", folder, device, stack)
        for _ in range(WARM_UP + rounds):
            for worker in workers.values():
                worker.turn(2)
            machines.append(measure(device, bf16=device == "cuda"))
    machine = best(machines)

    def point(size: Size, field: str) -> dict[str, Any]:
        summary = workers[size].summary()
        return {
            field: getattr(size, field),
            "seconds": summary["seconds"]["step"],
            "seconds_floor": floor(size, machine)["step"],
            "memory": summary["memory"]["increase"],
            "memory_floor": memory_estimate(size),
        }

    curves = {field: [point(size, field) for size in line] for field, line in points.items()}
    return {"base": asdict(base), "rounds": rounds, "machine": asdict(machine), "lines": curves}


def scaling_table(report: dict[str, Any]) -> str:
    lines = ["| | | seconds per step | floor | memory increase, MiB | estimate |"]
    lines.append("|---|---|---|---|---|---|")
    for field, points in report["lines"].items():
        for at in points:
            memory = [at["memory"] / 2**20, at["memory_floor"] / 2**20]
            cells = map(shown, [at["seconds"], at["seconds_floor"], *memory])
            lines.append(f"| {field} | {at[field]:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharey="row", sharex="col")
    names = {"batch": "completions", "tokens": "tokens of a completion", "vocab": "vocabulary"}
    curves = ("seconds", 1, "floor"), ("memory", 2**20, "estimate")
    for column, (field, points) in enumerate(report["lines"].items()):
        x = [at[field] for at in points]
        for ax, (what, unit, least) in zip(axes[:, column], curves, strict=True):
            ax.loglog(x, [at[what] / unit for at in points], "o-", label="ours")
            ax.loglog(x, [at[f"{what}_floor"] / unit for at in points], "--", label=least)
            ax.set_xticks(x, [f"{value:,}" for value in x])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
            ax.grid(alpha=0.3)
        axes[1, column].set_xlabel(names[field])
    axes[0, 0].set_ylabel("seconds per step")
    axes[1, 0].set_ylabel("memory increase, MiB")
    axes[0, 0].legend()
    axes[1, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = options(__doc__.splitlines()[0], "scaling.json")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    need_tokenizer(parser, arguments.tokenizer)
    device = arguments.device
    report = header(device) | scaling(device, arguments.rounds, arguments.tokenizer)
    print(scaling_table(report))
    draw(report, arguments.out.with_suffix(".png"))
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
