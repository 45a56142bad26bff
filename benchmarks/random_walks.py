"""Does it find the optimum? trlx's random walks, from start rates of 1e-7 to 1, beside TRL's RLOO.

    python benchmarks/random_walks.py [--graphs 0 1 …] [--rates 1e-7 …] [--processes 2]
    python benchmarks/random_walks.py --report            the table from the results

Task, model and settings are those of examples/random_walks.py; `ours` is its two runs of train.py.
`TRL` is RLOOTrainer at its defaults with the same model, prompts, reward, completions per step and
number of steps; bf16 and gradient checkpointing, which are slower on a CPU, are off. Its default
rate is 1e-6. Score: trlx's optimality of 50 walks from each start, sampled at temperature 1; the
optimum is 1. A run has one thread; processor and wall seconds leave out imports and pre-training.
Settings were chosen on graphs from 100 on, which are not reported.

Raw results, one line per run: random_walks.jsonl. What is there is not run again.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import publish, read
from tabulate import tabulate
from trl_side import trl_config

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from examples.random_walks import (  # noqa: E402
    SETTINGS,
    STEPS,
    Graph,
    ShortestPath,
    pretrain,
    reinforce,
    score,
)  # fmt: skip

RATES = [10.0**k for k in range(-7, 1)]
RESULTS = HERE / "random_walks.jsonl"
TRL_RATE = 1e-6
SHARE, SECONDS = 0.99, 60  # what is asked of each run


def ours(graph: Graph, rate: float, model: Path, scratch: Path) -> Path:
    return reinforce(graph, model, scratch / "run", f"LRATE={rate}", "LOG_EVERY=0")


def trl(graph: Graph, rate: float, model: Path, scratch: Path) -> Path:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import RLOOTrainer

    config = trl_config(
        output_dir=str(scratch),
        learning_rate=rate,
        per_device_train_batch_size=SETTINGS["BATCH_SIZE"],
        num_generations=SETTINGS["NUM_GENERATIONS"],
        max_completion_length=SETTINGS["MAX_NEW_TOKENS"],
        max_steps=STEPS,
    )
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=ShortestPath(**graph.arguments),
        args=config,
        train_dataset=Dataset.from_list(json.loads((model / "prompts.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )
    trainer.train()
    trainer.save_model(str(scratch / "final"))
    return scratch / "final"


METHODS: dict[str, Callable[[Graph, float, Path, Path], Path]] = {"ours": ours, "TRL": trl}


def quiet() -> None:
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def prepare(models: Path, graph: int) -> None:
    pretrain(Graph(graph), models / str(graph))


def run(models: Path, job: tuple[int, float, str]) -> dict[str, Any]:
    number, rate, method = job
    graph, first = Graph(number), models / str(number)
    with tempfile.TemporaryDirectory() as scratch:
        wall, start = time.perf_counter(), time.process_time()
        trained = METHODS[method](graph, rate, first, Path(scratch))
        seconds, wall = time.process_time() - start, time.perf_counter() - wall
        found = {"optimality": score(graph, trained), "greedy": score(graph, trained, greedy=True)}
    return {
        "graph": number, "rate": rate, "method": method,
        **{name: round(value, 5) for name, value in found.items()},
        "untrained": round(score(graph, first), 5), "steps": STEPS,
        "seconds": round(seconds, 1), "wall": round(wall, 1),
    }  # fmt: skip


def run_all(jobs: list[tuple[int, float, str]], results: Path, processes: int) -> None:
    """Runs what `results` lacks and appends it."""
    done = {(row["graph"], row["rate"], row["method"]) for row in read(results)}
    todo = [job for job in jobs if job not in done]
    print(f"{len(todo)} of {len(jobs)} runs to do")
    pool = multiprocessing.get_context("spawn").Pool(processes, quiet)
    with tempfile.TemporaryDirectory() as models, pool, results.open("a") as file:
        pool.map(partial(prepare, Path(models)), sorted({graph for graph, _, _ in todo}), 1)
        for n, row in enumerate(pool.imap_unordered(partial(run, Path(models)), todo), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{n} of {len(todo)}: {row}", flush=True)


def mean(rows: list[dict[str, Any]], name: str, digits: int) -> str:
    return f"{statistics.mean(row[name] for row in rows):.{digits}f}"


def report(rows: list[dict[str, Any]]) -> str:
    """Tables in Markdown."""
    lines = []
    graphs = sorted({row["graph"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        table = []
        for rate in sorted({row["rate"] for row in own}):
            cell = [row for row in own if row["rate"] == rate]
            scores = [row["optimality"] for row in cell]
            table.append(
                [f"{rate:g}", len(cell), mean(cell, "untrained", 3), mean(cell, "optimality", 3),
                 f"{min(scores):.3f}", mean(cell, "greedy", 3),
                 f"{sum(value >= SHARE for value in scores)} of {len(cell)}",
                 mean(cell, "seconds", 0), f"{max(row['wall'] for row in cell):.0f}"]
            )  # fmt: skip
        heads = ["start rate", "graphs", "untrained", "optimality", "lowest", "greedy",
                 f"at least {SHARE}", "processor s", "longest, wall s"]  # fmt: skip
        default = f" Its default rate is {TRL_RATE:g}." if method == "TRL" else ""
        met = sum(row["optimality"] >= SHARE for row in own)
        lines += [
            f"### {method}",
            "",
            f"{met} of {len(own)} runs reach {SHARE} of the optimum, "
            f"{sum(row['wall'] <= SECONDS for row in own)} within {SECONDS} s.{default}",
            "",
            tabulate(table, heads, tablefmt="github", disable_numparse=True),
            "",
        ]
    return "\n".join([f"Graphs {', '.join(map(str, graphs))}.", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", nargs="*", type=int, default=range(10), help="seeds")
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[*METHODS])
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only report what there is")
    args = parser.parse_args()
    jobs = [
        (g, rate, method) for method in args.methods for rate in args.rates for g in args.graphs
    ]
    if not args.report:
        run_all(jobs, args.results, args.processes)
    publish(args.results, report)


if __name__ == "__main__":
    main()
