"""This program and TRL's RLOOTrainer at the same work, step by step in turn.

    python benchmarks/throughput.py [--sizes embedded 4x128 gpt2] [--pairs 7] [--device cpu]

Both get the same model, prompts, numbers of completions and tokens, KL penalty, reward (characters
/ 100) and torch's AdamW, TRL the fused one that is its default; dropout is off, temperature 1, one
update a batch, bf16 on a GPU, fp32 on a CPU (and bf16 in gpt2-bf16, where the CPU multiplies in
bf16); TRL runs without gradient checkpointing, logging and saving, on a GPU once more with vLLM
beside it, where that is installed. Each is a process of its own that waits for a line, does a step
and answers; they take turns of some steps (the first after a pause is slower), so that the
machine's other load hits both alike. A third does only the sampling, with transformers' `generate`
and without tokenizing and decoding. A ratio is the median over pairs of turns. The token that ends
a completion is the one the model likes least; the table shows how long completions were.

TRL's "reference" is two passes: it also computes the policy's own log-probabilities anew. "floor"
is what `floor` says, from a matrix product and a sum timed after every pair.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from sizes import ROOT, Machine, Size, build, floor, measure, memory_estimate, sizes
from workers import PHASES, WARM_UP, Worker, kinds

from adaptiverl.training.advice import cpu_multiplies_bf16

NO_BF16 = "this CPU has neither AVX512-BF16 nor AMX"


def compare(size: Size, pairs: int, steps: int, tokenizer: Path) -> dict[str, Any]:
    """The three workers in turn, in alternating order."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        build(size, tokenizer, Path(name))
        workers = [Worker(kind, Path(name), size.device, stack) for kind in kinds(size)]
        machines = []
        for turn in range(WARM_UP + pairs):
            for worker in workers if turn % 2 else reversed(workers):
                worker.turn(steps)
            machines.append(measure(size.device, size.bf16))
        row: dict[str, Any] = {worker.kind: worker.summary() for worker in workers}
    machine = best(machines)
    both = list(zip(row["ours"]["steps"], row["trl"]["steps"], strict=True))
    ratio = {
        phase: statistics.median(theirs[phase] / own[phase] for own, theirs in both)
        for phase in ("step", *PHASES)
        if phase in both[0][0]
    }
    least = floor(size, machine)
    speed = {
        kind: size.batch * row[kind]["length"] / row[kind]["seconds"]["rollout"]
        for kind in kinds(size)
    }
    speed["floor"] = size.batch * size.tokens / least["rollout"]
    measured = {"machine": asdict(machine), "floor": least, "ratio": ratio, "tokens/s": speed}
    return {"size": asdict(size), "pairs": pairs, "steps": steps} | measured | row


def best(machines: list[Machine]) -> Machine:
    """The peak is the most that was ever measured."""
    return Machine(max(m.flops for m in machines), max(m.bandwidth for m in machines))


def comparison_table(row: dict[str, Any]) -> str:
    size, sides, speed = Size(**row["size"]), (row["ours"], row["trl"]), row["tokens/s"]
    cells: dict[str, list[float | None]] = {}
    for phase in ("step", *PHASES, "other"):
        seconds = [side["seconds"].get(phase) for side in sides]
        cells[f"{phase}, s"] = [*seconds, row["ratio"].get(phase), row["floor"].get(phase)]
    for name, least in (("increase", memory_estimate(size) / 2**20), ("peak", None)):
        own, theirs = (side["memory"][name] / 2**20 for side in sides)
        cells[f"memory, {name}, MiB"] = [own, theirs, theirs / own if own > 0 else None, least]
    cells["tokens of a completion"] = [*(side["length"] for side in sides), None, None]
    lines = [f"**{size}**", "", "| | ours | TRL | TRL / ours | floor |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | " + " | ".join(map(shown, values)) + " |" for name, values in cells.items()
    ]
    return "\n".join(lines) + (
        f"\n\nSampling: ours {speed['ours']:,.0f} tokens/s, `generate` {speed['generate']:,.0f}, "
        f"{speed['ours'] / speed['generate']:.1f} times as many; "
        f"{speed['ours'] / speed['floor']:.0%} of the floor's. {with_vllm(row)}The machine's peak: "
        f"{row['machine']['flops'] / 1e9:,.0f} GFLOP/s, "
        f"{row['machine']['bandwidth'] / 1e9:,.1f} GB/s. {row['pairs']} pairs of turns of "
        f"{row['steps']}.\n"
    )


def with_vllm(row: dict[str, Any]) -> str:
    """TRL's step with vLLM beside ours, where it was run."""
    if "trl+vllm" not in row:
        return ""
    seconds = [row[kind]["seconds"]["step"] for kind in ("trl+vllm", "ours")]
    return f"A step of TRL with vLLM: {seconds[0]:.3g} s, {seconds[0] / seconds[1]:.2f} of ours. "


def shown(x: float | None) -> str:
    """Three digits, or a dash for what there is not."""
    return "–" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def header(device: str) -> dict[str, Any]:
    """When and on what a report was made."""
    return {
        "date": str(datetime.date.today()),
        "machine": machine_name(device),
        "versions": {package: version(package) for package in ("torch", "transformers", "trl")},
    }


def options(description: str, out: str) -> argparse.ArgumentParser:
    """What both benchmarks of speed are told."""
    parser = argparse.ArgumentParser(description=description)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    default = ROOT.parent / "shared" / "data" / "gpt2-tokenizer"
    parser.add_argument("--tokenizer", type=Path, default=default, help="vocab.json, merges.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / out)
    return parser


def need_tokenizer(parser: argparse.ArgumentParser, folder: Path) -> None:
    if not (folder / "merges.txt").exists():
        parser.error(
            f"no merges.txt in {folder}: say --tokenizer FOLDER, one that holds vocab.json and "
            "merges.txt of openai-community/gpt2"
        )


def main() -> None:
    parser = options(__doc__.splitlines()[0], "throughput.json")
    names = sorted({*sizes("cpu"), *sizes("cuda")})
    parser.add_argument("--sizes", nargs="+", choices=names, help="default: all")
    parser.add_argument("--pairs", type=int, default=7, help="turns of both that count")
    parser.add_argument("--steps", type=int, default=3, help="a turn")
    arguments = parser.parse_args()
    device = arguments.device
    chosen = arguments.sizes or list(sizes(device))
    if missing := set(chosen) - set(sizes(device)):
        parser.error(f"{', '.join(sorted(missing))} is for a CPU")
    if chosen != ["embedded"]:
        need_tokenizer(parser, arguments.tokenizer)
    report = header(device) | {"rows": []}
    print(", ".join([report["machine"], *(f"{k} {v}" for k, v in report["versions"].items())]))
    for name in chosen:
        size = sizes(device)[name]
        if device == "cpu" and size.bf16 and not cpu_multiplies_bf16():
            report["rows"].append({"size": asdict(size), "open": NO_BF16})
            print(f"\n**{size}**\n\nopen: {NO_BF16}")
            continue
        report["rows"].append(compare(size, arguments.pairs, arguments.steps, arguments.tokenizer))
        print("\n" + comparison_table(report["rows"][-1]), flush=True)
    if device == "cpu":
        size = sizes("cuda")["gpt2"]
        report["rows"].append({"size": asdict(size), "open": "no GPU"})
        print(f"\n**{size}**\n\nopen: no GPU")
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
