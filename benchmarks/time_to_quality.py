"""How long until it is good? Seconds to a level of reward, beside TRL's RLOOTrainer.

    python benchmarks/time_to_quality.py [--tasks …] [--rates …] [--seeds …] [--steps 100]
    python benchmarks/time_to_quality.py --report         the tables from the results

A run has reached a level where the mean reward of ten steps in a row is at least it, and ends
there, or after 100 steps. Seconds are those of the whole process, from its start, imports and
loading included. `ours` is train.py with config.json, whose rate is its default, "auto"; TRL is
RLOOTrainer with the same model, prompts, rewards, batch, tokens, temperature and KL penalty, in
fp32 and without gradient checkpointing, at its default rate and at swept constant ones. Its best
rate is the one that most seeds reach the level with, then the fastest. With its sweep counted it
has the seconds of all swept rates of the same seed, of which each ends as soon as it may: a user
who does not know the level beforehand would wait longer.

Tasks: `default`, praise by the classifier of config.json; `sparse`, a word that 4 % of completions
have; `noisy`, `default` with normal noise of 0.5 on each reward, which the level does not count.
One run at a time, seeds outermost, so that the machine's other load hits all alike. Raw results,
one line per run: time_to_quality.jsonl. What is there is not run again.
"""

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tabulate import tabulate

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from rows import publish, read  # noqa: E402
from trl_side import trl_config  # noqa: E402

RESULTS = HERE / "time_to_quality.jsonl"
STEPS, WINDOW, NOISE = 100, 10, 0.5
RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]
LEVELS = {"default": 0.80, "sparse": 0.50, "noisy": 0.80}
KEY = ("task", "side", "rate", "seed")
Job = tuple[str, str, float | None, int]  # a rate of None is the side's default


class Noise:
    """A reward of nothing but normal noise, the same numbers for the same seed."""

    __name__ = "noise"  # as TRL logs it

    def __init__(self, seed: int):
        self.chance = random.Random(seed)

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        return [self.chance.gauss(0.0, NOISE) for _ in completions]


class Watch:
    """Sees each step's reward, and when the level is reached; times are of the wall clock."""

    def __init__(self, task: str, started: float):
        self.level, self.started = LEVELS[task], started
        self.rewards: list[float] = []
        self.times: list[float] = []  # seconds from the start of the process

    def __call__(self, reward: float) -> bool:
        """Whether the run has reached its level."""
        self.rewards.append(round(reward, 4))
        self.times.append(round(time.time() - self.started, 2))
        return self.reached

    @property
    def reached(self) -> bool:
        last = self.rewards[-WINDOW:]
        return len(last) == WINDOW and statistics.mean(last) >= self.level


def rewards_of(task: str, seed: int) -> list[dict[str, Any]]:
    """As a config declares them; the first is what the level is of."""
    if task == "sparse":
        return [{"TYPE": "regex", "NAME": "word", "PATTERNS": r"\btime\b"}]
    praise = {"TYPE": "classifier", "NAME": "praise", "LABEL": "positive"}
    praise |= {"MODEL": "adaptiverl/assets/sentiment"}
    noise = {"TYPE": "python", "FUNCTION": "time_to_quality:Noise", "ARGS": {"seed": seed}}
    return [praise, noise] if task == "noisy" else [praise]


def ours(task: str, rate: float | None, seed: int, steps: int, watch: Watch, scratch: Path) -> None:
    from adaptiverl.files.process import StopSignal
    from adaptiverl.training.build import build
    from adaptiverl.training.folder import RunFolder
    from train import train

    class Watched(RunFolder):
        def record(self, metrics, samples):
            super().record(metrics, samples)
            if watch(metrics[f"rewards/{c.REWARDS[0].name}/mean"]):
                stop.number = signal.SIGTERM

    c = config_of(task, rate, seed, steps, scratch)
    parts = build(c)
    stop = StopSignal(parts.scoring.interrupt)
    with closing(Watched(c, parts)) as folder:
        folder.open()
        train(c, parts, folder, stop)


def config_of(task: str, rate: float | None, seed: int, steps: int, scratch: Path) -> Any:
    """config.json with the task's rewards; its other keys are those of both sides."""
    from adaptiverl.config.loading import load_config
    from adaptiverl.training.keys import RunConfig

    keys = [f"SEED={seed}", f"STEPS={steps}", f"OUTPUT_DIR={scratch / 'run'}", "SAVE_EVERY=0"]
    keys += [f"REWARDS={json.dumps(rewards_of(task, seed))}"]
    keys += [] if rate is None else [f"LRATE={rate}"]
    return load_config(ROOT / "config.json", keys, schema=RunConfig)


def trl(task: str, rate: float | None, seed: int, steps: int, watch: Watch, scratch: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOTrainer

    from rewards import CompositeReward

    c = config_of(task, None, seed, steps, scratch)
    made = [CompositeReward([each]) if each.type != "python" else Noise(seed) for each in c.REWARDS]

    class Watched(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            logged = trainer._metrics["train"]
            first = next(k for k in logged if k.startswith("rewards/") and k.endswith("/mean"))
            if watch(logged[first][-1]):
                control.should_training_stop = True

    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(c.MODEL, dtype="float32"),
        reward_funcs=made,
        args=trl_config(
            output_dir=str(scratch),
            per_device_train_batch_size=c.BATCH_SIZE,
            num_generations=c.NUM_GENERATIONS,
            max_completion_length=c.MAX_NEW_TOKENS,
            temperature=c.TEMPERATURE,
            beta=c.KL_COEF,
            lr_scheduler_type="constant",
            max_steps=steps,
            seed=seed,
            **({} if rate is None else {"learning_rate": rate}),
        ),
        train_dataset=Dataset.from_list(json.loads(Path(c.TRAIN_FILE).read_text())),
        processing_class=AutoTokenizer.from_pretrained(c.MODEL, padding_side="left"),
        callbacks=[Watched()],
    )
    trainer.train()


SIDES = {"ours": ours, "TRL": trl}


def work(job: Job, steps: int, started: float, out: Path) -> None:
    """One run, in this process."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    task, side, rate, seed = job
    watch = Watch(task, started)
    with tempfile.TemporaryDirectory() as scratch:
        SIDES[side](task, rate, seed, steps, watch, Path(scratch))
    row = dict(zip(KEY, job, strict=True))
    row |= {"level": watch.level, "reached": watch.reached, "steps": len(watch.rewards)}
    row |= {"seconds": watch.times[-1], "times": watch.times, "rewards": watch.rewards}
    out.write_text(json.dumps(row))


def run(job: Job, steps: int) -> dict[str, Any]:
    """One run, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        told = json.dumps([job, steps, time.time(), str(out)])
        command = [sys.executable, str(Path(__file__).resolve()), "--one", told]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def run_all(jobs: Sequence[Job], steps: int, results: Path) -> None:
    """Runs what `results` lacks, one after the other, and appends it."""
    done = {tuple(row[name] for name in KEY) for row in read(results)}
    todo = [job for job in jobs if job not in done]
    print(f"{len(todo)} of {len(jobs)} runs to do")
    with results.open("a") as file:
        for n, job in enumerate(todo, 1):
            row = run(job, steps)
            file.write(json.dumps(row) + "\n")
            file.flush()
            end = "reached" if row["reached"] else "not reached"
            print(f"{n} of {len(todo)}: {job}: {end}, {row['seconds']:.1f} s", flush=True)


# The tables


def best_rate(rows: list[dict[str, Any]]) -> float | None:
    """TRL's, of those that were swept; None where there is none."""
    swept = [row for row in rows if row["side"] == "TRL" and row["rate"] is not None]

    def worth(rate: float) -> tuple[float, float]:
        own = [row for row in swept if row["rate"] == rate]
        share = statistics.mean(row["reached"] for row in own)
        return share, -statistics.median(row["seconds"] for row in own)

    return max({row["rate"] for row in swept}, key=worth, default=None)


def with_sweep(rows: list[dict[str, Any]], best: float | None) -> list[dict[str, Any]]:
    """The runs at the best rate, each with the seconds of all rates of its seed."""
    swept = [row for row in rows if row["side"] == "TRL" and row["rate"] is not None]
    return [
        row | {"seconds": sum(each["seconds"] for each in swept if each["seed"] == row["seed"])}
        for row in swept
        if row["rate"] == best
    ]


def _sweeps(rows: list[dict[str, Any]]) -> str:
    """How many rates were swept, by seed."""
    swept = [row["seed"] for row in rows if row["side"] == "TRL" and row["rate"] is not None]
    counts = sorted({swept.count(seed) for seed in swept})
    return f" ({' or '.join(map(str, counts))} rates)" if counts else ""


def cells(name: str, own: list[dict[str, Any]], mine: dict[int, dict[str, Any]]) -> list[str]:
    """A row of the table: a run that did not reach the level took longer than its seconds."""
    if not own:
        return [name, *["open"] * 5]
    ratios, reached = [], sum(row["reached"] for row in own)
    for row in own:
        pair = mine.get(row["seed"])
        if pair and pair["reached"]:
            ratios.append(row["seconds"] / pair["seconds"])
    more = "" if reached > len(own) / 2 else "> "  # of the median
    seconds = f"{more}{statistics.median(row['seconds'] for row in own):.1f}"
    steps = f"{more}{statistics.median(row['steps'] for row in own):.0f}"
    times = f"{more}{statistics.median(ratios):.2f}" if ratios else "–"
    begun = statistics.median(row["times"][0] for row in own)
    return [name, f"{reached} of {len(own)}", seconds, f"{begun:.1f}", steps, times]


def report(rows: list[dict[str, Any]]) -> str:
    """A table of medians for each task, in Markdown."""
    lines = []
    for task, level in LEVELS.items():
        found = [row for row in rows if row["task"] == task]
        mine = {row["seed"]: row for row in found if row["side"] == "ours"}
        best = best_rate(found)
        at = {
            rate: [row for row in found if row["side"] == "TRL" and row["rate"] == rate]
            for rate in (best, None)
        }
        shown = f" ({best:g})" if best is not None else ""
        table = [
            cells("ours, as it is", [*mine.values()], mine),
            cells(f"TRL at its best swept rate{shown}", at[best] if best else [], mine),
            cells(
                f"TRL, with the seconds of its sweep{_sweeps(found)}", with_sweep(found, best), mine
            ),
            cells("TRL at its default rate", at[None], mine),
        ]
        heads = ["", "reached", "seconds", "to step 1", "steps", "seconds / ours"]
        lines += [
            f"### {task}: a mean reward of {level:g} over {WINDOW} steps",
            "",
            tabulate(table, heads, tablefmt="github", disable_numparse=True),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=LEVELS, default=[*LEVELS])
    parser.add_argument("--rates", nargs="*", type=float, default=RATES, help="TRL's sweep")
    parser.add_argument("--swept-only", action="store_true", help="without TRL's default rate")
    parser.add_argument("--seeds", nargs="*", type=int, default=range(5))
    parser.add_argument("--steps", type=int, default=STEPS, help="at most so many")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only report what there is")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        job, steps, started, out = json.loads(args.one)
        work(tuple(job), steps, started, Path(out))
        return
    default = [] if args.swept_only else [("TRL", None)]
    sides = [("ours", None), *default, *(("TRL", rate) for rate in args.rates)]
    jobs = [(t, side, rate, s) for s in args.seeds for t in args.tasks for side, rate in sides]
    if not args.report:
        run_all(jobs, args.steps, args.results)
    publish(args.results, report)


if __name__ == "__main__":
    main()
