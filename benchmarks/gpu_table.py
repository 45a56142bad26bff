"""The table of `make gpu` in docs/cuda.md, from gpu.json; a row that no card ran says "open"."""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "gpu.json"
BEGIN, END = "<!-- gpu: written by `make gpu` -->", "<!-- end of gpu -->"
ITEMS = {
    "log-probabilities": "log-probabilities of graphs, reference and loss beside an unpadded pass; "
    "fp32, bf16, fp16",
    "same samples": "the same samples with graphs and without; batches of 1 to 33, early ends, "
    "EOS at once",
    "kernels": "the kernels of sampling beside torch: norm, attention over the cache, the draw",
    "new weights": "graphs see new weights: after every optimizer, `load_state_dict`, adapters "
    "merged and not, 4 and 8 bits",
    "precisions": "FP16 with its scaler, BF16, LoRA, 4 and 8 bits, 8-bit AdamW train and resume",
    "no synchronisation": "no optimizer's step waits for the device",
    "the first README's config": "GPT-2 124M by the first README's config, 60 steps",
    "kill and resume": "killed and resumed: the same to the last bit, deterministically",
    "processes": "NCCL: one process, two on one card where it allows, DDP and FSDP on two",
    "memory": "memory is flat over 300 steps; an exception leaves nothing on the card",
    "throughput": "GPT-2 124M, 64 × (64 + 64) tokens, bf16: ours, `generate`, TRL, TRL with vLLM",
}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown of the newest run, and a line on each other version of torch."""
    parts = runs[0]["parts"] if runs else []
    lines = ["| on a card | result | seconds | figures |", "|---|---|---|---|"]
    for item, words in ITEMS.items():
        own = [part for part in parts if part["item"] == item]
        seconds = f"{sum(part['seconds'] for part in own):.0f}" if own else ""
        lines.append(f"| {words} | {result(own)} | {seconds} | {figures(own)} |")
    if runs:
        lines += ["", *(f"{on_what(run)}: {result(run['parts'])}." for run in runs)]
    return "\n".join(lines)


def result(parts: list[dict[str, Any]]) -> str:
    """How many passed of those that could, and what the others did."""
    if not parts:
        return "open"
    by = {kind: [part for part in parts if part["outcome"] == kind] for kind in
          ("passed", "failed", "skipped", "left out")}  # fmt: skip
    said = []
    if ran := len(by["passed"]) + len(by["failed"]):
        said.append(f"{len(by['passed'])} of {ran} passed")
    if by["skipped"]:
        why = sorted({part["why"].splitlines()[-1] for part in by["skipped"]})
        said.append(f"{len(by['skipped'])} skipped ({'; '.join(why)})")
    if by["left out"]:
        said.append(f"{len(by['left out'])} open: out of time")
    return ", ".join(said)


def figures(parts: list[dict[str, Any]]) -> str:
    found = {name: value for part in parts for name, value in part["figures"].items()}
    return ", ".join(f"{name}: {value:.3g}" for name, value in found.items()).replace("|", "/")


def on_what(run: dict[str, Any]) -> str:
    own = run["environment"]
    return f"{own['card']}, torch {own['torch']}, CUDA {own['CUDA']}, {own['date']}"


def with_table(text: str, runs: list[dict[str, Any]]) -> str:
    """`text` with the table between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(runs)}\n{END}{after}"


def write_table(results: Path, page: Path) -> tuple[str, int]:
    """The table, which it writes into `page`, and how many parts of the newest run failed."""
    runs = json.loads(results.read_text())["runs"] if results.exists() else []
    page.write_text(with_table(page.read_text(encoding="utf-8"), runs), encoding="utf-8")
    parts = runs[0]["parts"] if runs else []
    return table(runs), sum(part["outcome"] == "failed" for part in parts)
