"""The trust region inside TRL's trainers: does any start rate work there, too?

    python benchmarks/trl_rates.py [--trainers …] [--tasks …] [--methods …] [--rates …] [--seeds …]
    python benchmarks/trl_rates.py --report               the table from the results

What a user of TRL writes, of which two lines are new:

    tap = RewardTap(reward)
    mini = AdamMini(model.parameters(), lr=rate)
    optimizer = AdaptiveOptimizer(mini, "trust_region", steps=STEPS)
    trainer = RLOOTrainer(model, reward_funcs=tap, …, optimizers=(optimizer, None))
    trainer.add_callback(TrustRegionCallback(optimizer, tokenizer, tap.texts, tap.informative))
    trainer.train()

`trust_region` is this, `constant` the same trainer without it. Trainers are at their defaults but
for the task's batch, tokens, temperature, beta (0.02 per nat) and a constant rate; bf16 and
gradient checkpointing are off. "GRPO, unscaled" has `scale_rewards="none"`, so that `beta` weighs
against the reward itself, as in the score. Model, prompts and length control are those of
lr_robustness.py; "rare" pays for the word "seen", which 4 % of the first policy's completions have.
Score: the mean reward of 256 fresh completions of the last policy less 0.02 per nat of KL to the
first. Reported is the share of the gain, (score − untrained) / (best constant − untrained), of
means over seeds. A run has collapsed where its score is more than 0.1 below the untrained one, or
its entropy below 0.1.

Raw results, one line per run: trl_rates.jsonl. What is there is not run again.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from lr_robustness import GROUP, KL_COEF, TEMPERATURE, TOKENS, Bench, Task  # noqa: E402
from rows import publish, read  # noqa: E402
from trl_side import trl_config  # noqa: E402

from adaptiverl import AdamMini, AdaptiveOptimizer  # noqa: E402
from adaptiverl.integrations.trl import RewardTap, TrustRegionCallback  # noqa: E402
from adaptiverl.rl.policy import Policy  # noqa: E402
from adaptiverl.rl.sampling.sampler import Sampler  # noqa: E402
from rewards import LengthReward, RegexReward  # noqa: E402

BATCH, STEPS = 32, 60
RATES = [1e-7, 1e-5, 1e-3, 1e-1]
CONSTANTS = [1e-5, 1e-4, 3e-4, 1e-3]  # the best of them is the reference
TRAINERS = {  # TRL's name, and what is not its default
    "RLOO": ("RLOO", {}),
    "GRPO": ("GRPO", {}),
    "GRPO, unscaled": ("GRPO", {"scale_rewards": "none"}),
}
METHODS = {"trust_region": RATES, "constant": sorted({*RATES, *CONSTANTS})}
TASKS = {
    "length": lambda: LengthReward(target=10, unit="words"),
    "rare": lambda: RegexReward(patterns=[r"\bseen\b"]),
}
RESULTS = HERE / "trl_rates.jsonl"
KEY = ("trainer", "task", "method", "rate", "seed")
Job = tuple[str, str, str, float, int]


@cache
def bench() -> Bench:
    """What all runs of a process share."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return Bench()


def judge(task: str, lm: torch.nn.Module) -> dict[str, Any]:
    first = bench().policy("small", lora=False).lm.requires_grad_(False)
    sampler = Sampler(Policy(lm, first, TEMPERATURE), bench().tokenizers["small"])
    return bench().judge(Task([(1.0, TASKS[task]())]), sampler, None)


@cache
def untrained(task: str) -> float:
    return judge(task, bench().policy("small", lora=False).lm)["score"]


def make_trainer(
    kind: str, task: str, method: str, rate: float, seed: int, folder: str, steps: int = STEPS
) -> Any:
    """One of TRAINERS, with the trust region or without."""
    import trl
    from datasets import Dataset

    name, own = TRAINERS[kind]
    config = trl_config(
        name,
        **own,
        output_dir=folder,
        learning_rate=rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=BATCH,
        num_generations=GROUP,
        max_completion_length=TOKENS,
        max_steps=steps,
        temperature=TEMPERATURE,
        beta=KL_COEF,
        seed=seed,
    )
    model, tokenizer = bench().policy("small", lora=False).lm, bench().tokenizers["small"]
    tap, optimizer = RewardTap(TASKS[task]()), None
    if method == "trust_region":
        mini = AdamMini(model.parameters(), lr=rate, weight_decay=0.0)
        optimizer = AdaptiveOptimizer(mini, "trust_region", steps=steps)
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        reward_funcs=tap,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": bench().prompts}),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    if optimizer:
        trainer.add_callback(
            TrustRegionCallback(optimizer, tokenizer, tap.texts, informative=tap.informative)
        )
    return trainer


def run(job: Job) -> dict[str, Any]:
    task, before = job[1], untrained(job[1])
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(*job, folder)
        wall, start = time.perf_counter(), time.process_time()
        try:
            trainer.train()
            found = judge(task, trainer.model)
        except RuntimeError as error:  # torch samples from no NaN: the policy is gone
            if "probability tensor" not in str(error):
                raise
            found = dict.fromkeys(("score", "reward", "kl", "entropy"))
    return {
        **dict(zip(KEY, job, strict=True)), **found, "untrained": before,
        "seconds": round(time.process_time() - start, 1),
        "wall": round(time.perf_counter() - wall, 1),
    }  # fmt: skip


def run_all(jobs: list[Job], results: Path, processes: int) -> None:
    """Runs what `results` lacks and appends it."""
    done = {tuple(row[name] for name in KEY) for row in read(results)}
    todo = [job for job in jobs if job not in done]
    print(f"{len(todo)} of {len(jobs)} runs to do")
    with multiprocessing.get_context("spawn").Pool(processes) as pool, results.open("a") as file:
        for n, row in enumerate(pool.imap_unordered(run, todo), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{n} of {len(todo)}: {row}", flush=True)


def collapsed(row: dict[str, Any]) -> bool:
    return (
        row["score"] is None or row["score"] < row["untrained"] - 0.1 or row["entropy"] < 0.1
    )  # fmt: skip


def mean(rows: list[dict[str, Any]], name: str, digits: int) -> str:
    known = [row[name] for row in rows if row[name] is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else "–"


def report(rows: list[dict[str, Any]]) -> str:
    """Tables in Markdown. A policy without finite probabilities has the lowest score there was."""
    lines = []
    for trainer, task in dict.fromkeys((row["trainer"], row["task"]) for row in rows):
        own = [row for row in rows if (row["trainer"], row["task"]) == (trainer, task)]
        floor = min([row["score"] for row in own if row["score"] is not None], default=0.0)
        cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for row in own:
            cells.setdefault((row["method"], row["rate"]), []).append(row)
        scores = {
            key: statistics.mean(floor if r["score"] is None else r["score"] for r in cell)
            for key, cell in cells.items()
        }
        before = own[0]["untrained"]
        constants = [s for (m, rate), s in scores.items() if m == "constant" and rate in CONSTANTS]
        gain = max(constants, default=before) - before
        table = [
            [method, f"{rate:g}", len(cell), f"{scores[method, rate]:.3f}",
             f"{(scores[method, rate] - before) / gain:.0%}" if gain > 0 else "–",
             mean(cell, "reward", 3), mean(cell, "kl", 1), sum(map(collapsed, cell)),
             mean(cell, "seconds", 0)]
            for (method, rate), cell in sorted(cells.items(), reverse=True)
        ]  # fmt: skip
        heads = ["method", "rate", "runs", "score", "share of the gain", "reward", "KL, nats",
                 "collapsed", "processor s"]  # fmt: skip
        lines += [
            f"### {trainer}, {task}",
            "",
            f"Untrained: {before:.3f}; the best constant gains {gain:.3f}.",
            "",
            tabulate(table, heads, tablefmt="github", disable_numparse=True),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainers", nargs="*", choices=TRAINERS, default=[*TRAINERS])
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=[*TASKS])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[*METHODS])
    parser.add_argument("--rates", nargs="*", type=float, help="instead of each method's own")
    parser.add_argument("--seeds", nargs="*", type=int, default=range(3))
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only report what there is")
    args = parser.parse_args()
    jobs = [
        (trainer, task, method, rate, seed)
        for seed in args.seeds
        for trainer in args.trainers
        for task in args.tasks
        for method in args.methods
        for rate in args.rates or METHODS[method]
    ]
    if not args.report:
        run_all(jobs, args.results, args.processes)
    publish(args.results, report)


if __name__ == "__main__":
    main()
