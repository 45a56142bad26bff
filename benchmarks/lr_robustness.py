"""Does any learning rate work? Every way of setting it, from start rates of 1e-7 to 1.

    python benchmarks/lr_robustness.py regimes      rewards, batches, lengths, LoRA, models
    python benchmarks/lr_robustness.py rates        eight schedules and four optimizers, swept
    python benchmarks/lr_robustness.py online       OnlineAdamW and its placebos
    python benchmarks/lr_robustness.py collapse     a thousand short runs from rates at random

Each runs what is missing, then reports; --report only reports. A run is REINFORCE as train.py has
it (RLOO, normalised advantages, clipping at 1, a penalty of 0.02 per nat) on a GPT-2 of 2 × 96, or
the embedded one of 4 × 192, both pre-trained on film reviews; completions have 24 tokens. Its score
is the mean reward less the penalty of 256 fresh completions of the last policy, without the noise
that a task may add; prompts and random numbers are the same for all. Defaults were chosen on other
tasks and seeds (README.md). Raw results, one line per run: regimes.jsonl, lr_robustness.jsonl,
online.jsonl, collapse.jsonl. Methods are in lr_methods.py, tables in lr_report.py.
"""

import argparse
import copy
import json
import multiprocessing
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from lr_methods import METHODS, ONLINE, REGIMES, Method, ScheduleFree  # noqa: E402
from lr_report import plot, report, report_collapse, report_online  # noqa: E402
from regimes import BASE, Regime, cells, regime_of, report_regimes  # noqa: E402
from rows import publish, read  # noqa: E402

from adaptiverl.rl.loading import load_policy, load_tokenizer  # noqa: E402
from adaptiverl.rl.policy import Policy  # noqa: E402
from adaptiverl.rl.reinforce import (  # noqa: E402
    advantages,
    is_informative,
    kl_per_token,
    token_weights,
)
from adaptiverl.rl.rollout import Rollout, uniforms  # noqa: E402
from adaptiverl.rl.sampling.sampler import Sampler  # noqa: E402
from rewards import ClassifierReward, LengthReward, RegexReward  # noqa: E402

MODELS = {"small": HERE / "policy-small", "embedded": HERE.parent / "adaptiverl/assets/policy"}
GROUP, TOKENS, TEMPERATURE, KL_COEF = 4, 24, 0.7, 0.02
PROBE = 2  # completions on which an update's KL is measured, or an eighth of a larger batch
JUDGED = 32  # completions per batch by which the last policy is judged
FRESH = 8  # batches that the last policy is judged by


# Tasks


class Task:
    """Rewards by weight, and the standard deviation of the noise that training sees on top."""

    def __init__(self, parts: list[tuple[float, Any]], noise: float = 0.0):
        self.parts, self.noise = parts, noise

    def __call__(self, prompts: list[str], texts: list[str], ids: list[list[int]]) -> torch.Tensor:
        total = torch.zeros(len(texts))
        for weight, reward in self.parts:
            values = reward(prompts, texts, completion_ids=ids)
            total += weight * torch.tensor([0.0 if v is None else v for v in values])
        return total


def tasks() -> dict[str, Task]:
    sentiment = ClassifierReward(model=str(HERE.parent / "adaptiverl/assets/sentiment"))
    length = LengthReward(target=10, unit="words")
    sparse = RegexReward(patterns=[r"\bgreat\b"])

    def marks(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """What a reward for enthusiasm may come down to: exclamation marks, up to ten."""
        return [min(text.count("!"), 10) / 10 for text in completions]

    return {
        "sentiment": Task([(1.0, sentiment)]),
        "length": Task([(1.0, length)]),
        "sparse": Task([(0.3, sentiment), (1.0, sparse)]),
        "noisy": Task([(1.0, length)], noise=1.0),
        "4 % hits": Task([(1.0, RegexReward(patterns=[r"\bseen\b"]))]),
        "4 % hits, embedded": Task([(1.0, RegexReward(patterns=[r"\btime\b"]))]),
        "1 % hits": Task([(1.0, RegexReward(patterns=[r"\bpeople\b"]))]),
        "hackable": Task([(1.0, marks)]),
    }


# One run


class Bench:
    """What all runs of a process share."""

    def __init__(self):
        torch.set_num_threads(1)
        self.first: dict[tuple[str, bool], Policy] = {}
        self.tokenizers = {name: load_tokenizer(str(path)) for name, path in MODELS.items()}
        self.tasks = tasks()
        rows = json.loads((HERE.parent / "data.json").read_text())
        self.prompts = [row["prompt"] for row in rows]

    def policy(self, model: str, lora: bool) -> Policy:
        if (model, lora) not in self.first:
            torch.manual_seed(0)  # of the adapter
            self.first[model, lora] = load_policy(
                str(MODELS[model]), full_tune=not lora, reference=lora,
                lora={"r": 8, "lora_alpha": 16},
            )  # fmt: skip
        lm = copy.deepcopy(self.first[model, lora].lm)
        reference = None if lora else copy.deepcopy(lm).requires_grad_(False)
        return Policy(lm, reference, TEMPERATURE)

    def rewards(self, task: Task, prompts: list[str], sampler: Sampler, rollout: Rollout):
        return task(prompts, sampler.decode(rollout), rollout.tokens())

    def run(self, regime: Regime, method: str, rate: float, seed: int) -> dict[str, Any]:
        name, batch, steps, lora, model = regime
        task, start, tokens = self.tasks[name], time.perf_counter(), 0
        policy = self.policy(model, lora)
        sampler = Sampler(policy, self.tokenizers[model])
        parameters = [p for p in policy.parameters() if p.requires_grad]
        kind = (METHODS | ONLINE | REGIMES)[method][0]
        way = kind(parameters, rate, seed, steps)
        chance = random.Random(seed)
        noise = torch.Generator().manual_seed(seed)
        trace = []
        for step in range(1, steps + 1):
            prompts = [p for p in chance.sample(self.prompts, batch // GROUP) for _ in range(GROUP)]
            with torch.no_grad():
                rollout = sampler(prompts, uniforms(seed, step, batch, TOKENS))
            if not rollout.logprobs.isfinite().all():
                break
            tokens += int(rollout.completion_mask.sum())
            true = self.rewards(task, prompts, sampler, rollout)
            reward = true + task.noise * torch.randn(batch, generator=noise)
            reference = sampler.policy.reference_logprobs(rollout)
            kl = kl_per_token(rollout.logprobs, reference).sum(-1)
            advantage, _ = advantages(
                reward - KL_COEF * kl, "rloo", group_size=GROUP, normalize=True
            )
            weights = token_weights(rollout.logprobs, rollout.completion_mask, advantage)
            measured = policy(rollout.with_weights(weights))
            (-measured.score).backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            way.loss = -measured.score.item()
            way.informative = is_informative(reward, "rloo", GROUP)
            if norm.isfinite():
                way.step(step, partial(moved, sampler, rollout))
            way.optimizer.zero_grad()
            way.after(step, float((reward - KL_COEF * kl).mean()))
            trace.append(round(float((true - KL_COEF * kl).mean()), 3))
        result = self.judge(task, sampler, way)
        result |= regime._asdict() | {"method": method, "rate": rate, "seed": seed}
        result |= {"tokens": tokens, "seconds": round(time.perf_counter() - start, 2)}
        return result | {
            "updates_scaled": way.updates_scaled,
            "sum_kl": round(way.sum_kl, 4),
            "trace": trace,
        }

    @torch.no_grad()
    def judge(self, task: Task, sampler: Sampler, way: Method) -> dict[str, Any]:
        """The last policy's score, reward, entropy, and nats per completion to the reference."""
        if isinstance(way, ScheduleFree):
            way.optimizer.eval()
        chance, scores, rewards, kls, entropies = random.Random(10**6), [], [], [], []
        for batch in range(FRESH):
            prompts = chance.sample(self.prompts, JUDGED)
            rollout = sampler(prompts, uniforms(10**6, batch, JUDGED, TOKENS))
            if not rollout.logprobs.isfinite().all():
                return {"score": None, "reward": None, "kl": None, "entropy": None}
            reward = self.rewards(task, prompts, sampler, rollout)
            kl = (rollout.logprobs - sampler.policy.reference_logprobs(rollout)).sum(-1)
            scores.append((reward - KL_COEF * kl).mean().item())
            rewards.append(reward.mean().item())
            kls.append(kl.mean().item())
            entropies.append(-(rollout.logprobs.sum() / rollout.completion_mask.sum()).item())
        names, columns = ("score", "reward", "kl", "entropy"), (scores, rewards, kls, entropies)
        return {n: round(statistics.mean(c), 5) for n, c in zip(names, columns, strict=True)}


def moved(sampler: Sampler, rollout: Rollout) -> float:
    """The KL of the last update on a few of the completions, nats per token."""
    size = len(rollout)
    part = rollout.select(torch.arange(0, size, min(max(size // PROBE, 1), 8)))
    now = sampler.policy.logprobs(part)
    kl = kl_per_token(part.logprobs, now, "k3")  # exact in expectation over the sampled tokens
    return (kl.sum() / part.completion_mask.sum()).item()


bench: Bench


def begin() -> None:
    global bench
    bench = Bench()


def job(arguments: tuple) -> dict[str, Any]:
    return bench.run(*arguments)


def run_all(jobs: list[tuple], results: Path, processes: int) -> None:
    """Runs what `results` lacks and appends it."""
    done = {(regime_of(row), row["method"], row["rate"], row["seed"]) for row in read(results)}
    todo = [one for one in jobs if one not in done]
    print(f"{len(todo)} of {len(jobs)} runs to do")
    start = time.time()
    with (
        multiprocessing.get_context("spawn").Pool(processes, begin) as pool,
        results.open("a") as f,
    ):
        for n, row in enumerate(pool.imap_unordered(job, todo), 1):
            f.write(json.dumps(row) + "\n")
            f.flush()
            if n % 20 == 0:
                left = (time.time() - start) / n * (len(todo) - n)
                print(f"{n} of {len(todo)}, {left / 60:.0f} minutes left", flush=True)


def suites() -> dict[str, tuple[list[tuple], str, Any]]:
    """The runs of each (regime, method, rate, seed), the file of their rows, and their report."""
    three = [BASE._replace(task=task) for task in ("length", "sparse", "noisy")]

    def swept(methods: dict[str, Any], regimes: list[Regime], seeds: range) -> list[tuple]:
        return [
            (regime, method, rate, seed)
            for seed in seeds
            for regime in regimes
            for method in methods
            for rate in methods[method][1]
        ]

    chance = random.Random(0)
    short = [BASE._replace(task=task, batch=8, steps=15) for task in ("length", "4 % hits")]
    return {
        "regimes": (cells(), "regimes.jsonl", report_regimes),
        "rates": (swept(METHODS, three, range(5)), "lr_robustness.jsonl", report),
        "online": (swept(ONLINE, three, range(10)), "online.jsonl", report_online),
        "collapse": (
            [
                (regime, "trust_region", float(f"{10 ** chance.uniform(-7, 0):.2g}"), seed)
                for seed in range(500)
                for regime in short
            ],
            "collapse.jsonl",
            report_collapse,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=suites())
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--report", action="store_true", help="only report what there is")
    args = parser.parse_args()
    jobs, file, tell = suites()[args.suite]
    results = HERE / file
    jobs = [
        one
        for one in jobs
        if (args.tasks is None or one[0].task in args.tasks)
        and (args.methods is None or one[1] in args.methods)
        and (args.seeds is None or one[3] in args.seeds)
    ]
    if not args.report:
        run_all(jobs, results, args.processes)
    publish(results, tell)
    if args.suite == "rates":
        plot(read(results), results.with_suffix(".png"))


if __name__ == "__main__":
    main()
