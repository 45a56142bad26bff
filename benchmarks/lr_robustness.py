"""Does any learning rate work? Every way of setting it, from start rates of 1e-7 to 1.

    python benchmarks/lr_robustness.py [--tasks …] [--methods …]    run what is missing, then report
    python benchmarks/lr_robustness.py --report                     table and plot from the results
    python benchmarks/lr_robustness.py online                       OnlineAdamW and its placebos
    python benchmarks/lr_robustness.py tuning                       what defaults were chosen among

A run is REINFORCE as train.py has it (AdamW, RLOO, normalised advantages, clipping at 1, a penalty
of 0.02 a nat) on a GPT-2 of 2 × 96, pre-trained on film reviews: STEPS steps of 32 completions of
24 tokens. Its score is the mean reward less the penalty of 256 fresh completions of the last
policy, without the noise that a task may add; prompts and random numbers are the same for all.
Defaults were chosen on the first task alone and with other seeds. Raw results, one line a run:
lr_robustness.jsonl, online.jsonl, tuning.jsonl. Methods are in lr_methods.py, tables in
lr_report.py.
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

from lr_methods import METHODS, ONLINE, STEPS, TUNING, Method, ScheduleFree  # noqa: E402
from lr_report import plot, read, report, report_online, report_tuning  # noqa: E402

from adaptiverl.rl.loading import load_policy, load_tokenizer  # noqa: E402
from adaptiverl.rl.policy import Policy  # noqa: E402
from adaptiverl.rl.reinforce import advantages, kl_per_token, token_weights  # noqa: E402
from adaptiverl.rl.rollout import Rollout, uniforms  # noqa: E402
from adaptiverl.rl.sampling.sampler import Sampler  # noqa: E402
from rewards import ClassifierReward, LengthReward, RegexReward  # noqa: E402

MODEL = str(HERE / "policy-small")
BATCH, GROUP, TOKENS, TEMPERATURE, KL_COEF = 32, 4, 24, 0.7, 0.02
PROBE = 4  # completions on which an update's KL is measured
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
    return {
        "sentiment": Task([(1.0, sentiment)]),
        "length": Task([(1.0, length)]),
        "sparse": Task([(0.3, sentiment), (1.0, sparse)]),
        "noisy": Task([(1.0, length)], noise=1.0),
        "sentiment-noisy": Task([(1.0, sentiment)], noise=1.0),
    }


# One run


class Bench:
    """What all runs of a process share."""

    def __init__(self):
        torch.set_num_threads(1)
        self.first = load_policy(MODEL, reference=False)
        self.tokenizer = load_tokenizer(MODEL)
        self.tasks = tasks()
        rows = json.loads((HERE.parent / "data.json").read_text())
        self.prompts = [row["prompt"] for row in rows]

    def rewards(self, task: Task, prompts: list[str], sampler: Sampler, rollout: Rollout):
        return task(prompts, sampler.decode(rollout), rollout.tokens())

    def run(self, name: str, method: str, rate: float, seed: int) -> dict[str, Any]:
        task, start, tokens = self.tasks[name], time.perf_counter(), 0
        lm = copy.deepcopy(self.first.lm)
        policy = Policy(lm, copy.deepcopy(self.first.lm).requires_grad_(False), TEMPERATURE)
        sampler = Sampler(policy, self.tokenizer)
        way = (METHODS | ONLINE | TUNING)[method][0](list(policy.parameters()), rate, seed)
        chance = random.Random(seed)
        noise = torch.Generator().manual_seed(seed)
        trace = []
        for step in range(1, STEPS + 1):
            prompts = [p for p in chance.sample(self.prompts, BATCH // GROUP) for _ in range(GROUP)]
            with torch.no_grad():
                rollout = sampler(prompts, uniforms(seed, step, BATCH, TOKENS))
            if not rollout.logprobs.isfinite().all():
                break
            tokens += int(rollout.completion_mask.sum())
            true = self.rewards(task, prompts, sampler, rollout)
            reward = true + task.noise * torch.randn(BATCH, generator=noise)
            reference = sampler.policy.reference_logprobs(rollout)
            kl = kl_per_token(rollout.logprobs, reference).sum(-1)
            advantage, _ = advantages(
                reward - KL_COEF * kl, "rloo", group_size=GROUP, normalize=True
            )
            weights = token_weights(rollout.logprobs, rollout.completion_mask, advantage)
            measured = policy(rollout.with_weights(weights))
            (-measured.score).backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            way.loss = -measured.score.item()
            if norm.isfinite():
                way.step(step, partial(moved, sampler, rollout))
            way.optimizer.zero_grad()
            way.after(step, float((reward - KL_COEF * kl).mean()))
            trace.append(
                [
                    round(float(x), 5)
                    for x in (true.mean(), kl.mean(), measured.entropy.sum() / BATCH)
                ]
                + [float(f"{way.next_rate:.3g}")]
            )
        result = self.judge(task, sampler, way)
        result |= {"task": name, "method": method, "rate": rate, "seed": seed}
        result |= {"tokens": tokens, "seconds": round(time.perf_counter() - start, 2)}
        return result | {
            "updates_scaled": way.updates_scaled,
            "steps": len(trace),
            "trace": trace[::4],
        }

    @torch.no_grad()
    def judge(self, task: Task, sampler: Sampler, way: Method) -> dict[str, Any]:
        """The last policy's score, reward and KL to the reference (nats a completion), entropy."""
        if isinstance(way, ScheduleFree):
            way.optimizer.eval()
        chance, scores, rewards, kls, entropies = random.Random(10**6), [], [], [], []
        for batch in range(FRESH):
            prompts = chance.sample(self.prompts, BATCH)
            rollout = sampler(prompts, uniforms(10**6, batch, BATCH, TOKENS))
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
    """The KL of the last update on a few of the completions, nats a token."""
    part = rollout.select(torch.arange(0, BATCH, BATCH // PROBE))
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
    done = {tuple(row[k] for k in ("task", "method", "rate", "seed")) for row in read(results)}
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


REPORTED = ["length", "sparse", "noisy"]
SUITES: dict[str, tuple[dict, str, Any, list[str], Any]] = {
    "rates": (METHODS, "lr_robustness.jsonl", report, REPORTED, range(5)),
    "online": (ONLINE, "online.jsonl", report_online, REPORTED, range(10)),
    "tuning": (
        TUNING, "tuning.jsonl", report_tuning, ["sentiment", "sentiment-noisy"], range(100, 103)
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", nargs="?", choices=SUITES, default="rates")
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--rates", nargs="*", type=float, help="instead of each method's own")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--report", action="store_true", help="only report what there is")
    args = parser.parse_args()
    methods, file, tell, tasks, seeds = SUITES[args.suite]
    results = args.results or HERE / file
    jobs = [
        (task, method, rate, seed)
        for seed in args.seeds or seeds
        for task in args.tasks or tasks
        for method in args.methods or methods
        for rate in args.rates or methods[method][1]
    ]
    if not args.report:
        run_all(jobs, results, args.processes)
    rows = read(results)
    text = tell(rows)
    results.with_suffix(".md").write_text(text)
    if args.suite == "rates":
        plot(rows, results.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
