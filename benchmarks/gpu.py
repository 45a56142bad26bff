"""What only a CUDA card can show, in one command: `make gpu`.

    python benchmarks/gpu.py [--minutes 10] [--tokenizer FOLDER] [--report]

Runs the tests marked `gpu` (tests/test_gpu_*.py), then `throughput.py` on the card, and writes
gpu.json and the table in docs/cuda.md; --report only writes that table. Rows of the table run side
by side, but for those that are timed. The parts are independent: after one that fails, the rest of
its row goes on in a new process, because an error of the device breaks the process that it happens
in. What does not fit into the minutes is said to be left out. Without a card it says so in one
line, and changes nothing. Leaves out the parts themselves.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_table import FILE, write_table

ROOT = Path(__file__).parent.parent
Part = dict[str, Any]
NO_CARD = "make gpu: there is no CUDA card here, so nothing was run and no row has changed"
FOR_THROUGHPUT = 150  # seconds that are kept for it
TIMED = ["the first README's config"]  # rows that run alone
STEPS = ["--pairs", "3", "--steps", "2"]


def environment() -> dict[str, Any]:
    """Of the card and of what the results depend on."""
    found: dict[str, Any] = {"date": str(datetime.date.today()), "torch": torch.__version__}
    for package in ("transformers", "trl", "accelerate", "peft", "bitsandbytes", "vllm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    card = torch.cuda.get_device_properties(0)
    return found | {
        "card": card.name,
        "cards": torch.cuda.device_count(),
        "memory, GiB": round(card.total_memory / 2**30, 1),
        "capability": f"{card.major}.{card.minor}",
        "CUDA": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }


def pytest(
    arguments: list[str], lines: Path, seconds: float, folder: Path = ROOT, **env: str
) -> list[dict[str, Any]]:
    """Runs pytest with the plugin; the lines that it wrote, whatever became of it."""
    lines.write_text("")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "gpu_plugin", "-q"]
    # Warnings of libraries on CUDA are shown: nobody has seen yet which there are.
    command += ["-p", "no:xdist", "-p", "no:cacheprovider", "-W", "default", *arguments]
    paths = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "GPU_LINES": str(lines)} | env
    with lines.with_suffix(".log").open("w+") as log:  # several run at once
        try:
            subprocess.run(
                command, cwd=folder, env=env, timeout=max(seconds, 1.0), stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            log.write("the time is up\n")
        log.seek(0)
        print(log.read(), flush=True)
    return [json.loads(line) for line in lines.read_text().splitlines()]


def collect(tests: list[str], scratch: Path, folder: Path = ROOT) -> dict[str, str]:
    """Every part with its row of the table, in the order of pytest."""
    lines = scratch / "collected.jsonl"
    said = pytest([*tests, "--collect-only"], lines, 300, folder, GPU_COLLECT="1")
    return dict(said[-1]["parts"]) if said else {}


def run_parts(
    items: dict[str, str], seconds: float, scratch: Path, folder: Path = ROOT
) -> list[Part]:
    """The results of all parts in `items`, of which some may not have been reached in time."""
    end, results = time.monotonic() + seconds, dict[str, Part]()

    def run_row(number: int, row: str) -> None:
        own, lines = [part for part in items if items[part] == row], scratch / f"{number}.jsonl"
        while (todo := [part for part in own if part not in results]) and time.monotonic() < end:
            said = pytest([*todo, "-x"], lines, end - time.monotonic(), folder)
            results.update(outcomes(said, out_of_time=time.monotonic() >= end))
            if not said:  # pytest itself does not start
                break

    rows = dict(enumerate(dict.fromkeys(items.values())))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        untimed = {number: row for number, row in rows.items() if row not in TIMED}
        list(pool.map(run_row, untimed.keys(), untimed.values()))
    for number in rows.keys() - untimed.keys():
        run_row(number, rows[number])
    left = {"outcome": "left out", "seconds": 0.0, "figures": {}, "why": "out of time"}
    return [{"part": part, "item": item} | results.get(part, left) for part, item in items.items()]


def outcomes(said: list[dict[str, Any]], out_of_time: bool) -> dict[str, Part]:
    """By part; one that was started and has no result took its process with it."""
    results: dict[str, Part] = {}
    for line in said:
        line = dict(line)
        part = line.pop("part")
        if line["outcome"] == "started":
            why = "out of time" if out_of_time else "its process ended"
            line = {"outcome": "failed", "seconds": 0.0, "figures": {}, "why": why}
        elif part in results and results[part]["outcome"] == "failed" and results[part]["seconds"]:
            continue  # its teardown
        results[part] = line
    return results


def throughput(seconds: float, tokenizer: Path | None) -> Part:
    """The row of GPT-2 in bf16, by throughput.py in a process of its own."""
    part: Part = {"part": "benchmarks/throughput.py", "item": "throughput", "figures": {}}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "throughput.json"
        command = [sys.executable, "throughput.py", "--device", "cuda", "--sizes", "gpt2", *STEPS]
        command += ["--out", str(out)] + (["--tokenizer", str(tokenizer)] if tokenizer else [])
        try:
            done = subprocess.run(
                command, cwd=ROOT / "benchmarks", timeout=max(seconds, 1.0), text=True,
                capture_output=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return part | {"outcome": "failed", "seconds": round(seconds), "why": "out of time"}
        part["seconds"] = round(time.monotonic() - start, 1)
        if done.returncode:
            outcome = "skipped" if "no merges.txt" in done.stderr else "failed"
            return part | {"outcome": outcome, "why": done.stderr.strip()[-1500:]}
        row = json.loads(out.read_text())["rows"][0]
    speed = row["tokens/s"]
    part["figures"] = {
        "ours, tokens/s": speed["ours"],
        "ours / generate": speed["ours"] / speed["generate"],
        "share of the roofline": speed["ours"] / speed["floor"],
        "step, s": row["ours"]["seconds"]["step"],
        "TRL / ours, step": row["ratio"]["step"],
    }
    if "trl+vllm" in row:
        theirs = row["trl+vllm"]["seconds"]["step"]
        part["figures"]["TRL with vLLM / ours, step"] = theirs / part["figures"]["step, s"]
    return part | {"outcome": "passed", "why": "", "row": row}


def keep(file: Path, found: dict[str, Any], parts: list[Part]) -> None:
    """Puts the results beside those of other versions of torch, the newest first."""
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    others = [run for run in runs if run["environment"]["torch"] != found["torch"]]
    new = {"environment": found, "parts": parts}
    file.write_text(json.dumps({"runs": [new, *others]}, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--tokenizer", type=Path, help="vocab.json and merges.txt of GPT-2")
    parser.add_argument("--report", action="store_true", help="only write docs/cuda.md's table")
    arguments = parser.parse_args()
    if not arguments.report:
        if not torch.cuda.is_available():
            print(NO_CARD)
            return 0
        end = time.monotonic() + 60 * arguments.minutes
        with tempfile.TemporaryDirectory() as scratch:
            files = sorted(map(str, (ROOT / "tests").glob("test_gpu_*.py")))
            items = collect(files, Path(scratch))
            if not items:
                print("make gpu: pytest found no part; why is above", file=sys.stderr)
                return 1
            parts = run_parts(items, end - time.monotonic() - FOR_THROUGHPUT, Path(scratch))
        parts.append(throughput(end - time.monotonic(), arguments.tokenizer))
        keep(FILE, environment(), parts)
    table, failed = write_table(FILE, ROOT / "docs/cuda.md")
    print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
