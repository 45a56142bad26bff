"""Does any learning rate work? Every way of setting it, from start rates of 1e-7 to 1.

    python benchmarks/lr_robustness.py [--tasks …] [--methods …]    run what is missing, then report
    python benchmarks/lr_robustness.py --report                     table and plot from the results

A run is REINFORCE as train.py has it (AdamW, RLOO, normalised advantages, clipping at 1, a penalty
of 0.02 a nat) on a GPT-2 of 2 × 96, pre-trained on film reviews: STEPS steps of 32 completions of
24 tokens. Its score is the mean reward less the penalty of 256 fresh completions of the last
policy, without the noise that a task may add; prompts and random numbers are the same for all.
Defaults were chosen on the first task alone and with other seeds. Raw results, one line a run:
lr_robustness.jsonl.
"""

import argparse
import copy
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from adaptiverl.optim.rules import kl_target  # noqa: E402
from adaptiverl.optim.trust_region import LastUpdate, TrustRegion, alignment  # noqa: E402
from adaptiverl.rl.policy import Policy, load_policy, load_tokenizer  # noqa: E402
from adaptiverl.rl.reinforce import advantages, kl_per_token, token_weights  # noqa: E402
from adaptiverl.rl.rollout import Rollout, uniforms  # noqa: E402
from adaptiverl.rl.sampler import Sampler  # noqa: E402
from rewards import make_reward  # noqa: E402

MODEL = str(HERE / "policy-small")
RESULTS = HERE / "lr_robustness.jsonl"
STEPS, BATCH, GROUP, TOKENS, TEMPERATURE, KL_COEF = 60, 32, 4, 24, 0.7, 0.02
PROBE = 4  # completions on which an update's KL is measured
FRESH = 8  # batches that the last policy is judged by
SEEDS = range(5)
DECADES = [10.0**k for k in range(-7, 1)]
SWEEP = [3e-5, 1e-4, 3e-4, 1e-3]
FEW = [1e-7, 1e-4, 1e-1]


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
    sentiment = make_reward(
        "classifier", model=str(HERE.parent / "adaptiverl/assets/sentiment"), label="positive"
    )
    length = make_reward("length", target=10, unit="words")
    sparse = make_reward("regex", patterns=[r"\bgreat\b"])
    return {
        "sentiment": Task([(1.0, sentiment)]),
        "length": Task([(1.0, length)]),
        "sparse": Task([(0.3, sentiment), (1.0, sparse)]),
        "noisy": Task([(1.0, length)], noise=1.0),
        "sentiment-noisy": Task([(1.0, sentiment)], noise=1.0),
    }


# Ways to set the rate: called after each step with what was seen, they set the next step's.


class Method:
    """AdamW at a constant rate; what the others derive from."""

    steers = False  # whether the KL of each update is measured

    def __init__(self, parameters: list, rate: float, seed: int):
        self.rate, self.optimizer = rate, self.make(parameters, rate)
        self.scheduler = self.schedule()
        self.random = random.Random(seed)
        self.region, self.braked = TrustRegion(settled=True), 0

    def make(self, parameters: list, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    def schedule(self) -> Any:
        return None

    def step(self, step: int, measure: Callable[[], float]) -> None:
        self.optimizer.step()

    def after(self, step: int, reward: float) -> None:
        if self.scheduler:
            self.scheduler.step()

    def set(self, rate: float) -> None:
        self.rate = min(max(rate, 1e-9), 10.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate


class Linear(Method):
    def schedule(self):
        warm = STEPS // 10
        return torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda t: min((t + 1) / warm, (STEPS - t) / (STEPS - warm))
        )


class Cosine(Method):
    def schedule(self):
        return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)


class OneCycle(Method):
    def schedule(self):
        return torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=self.rate, total_steps=STEPS + 1
        )


class Plateau(Method):
    def schedule(self):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, mode="max", factor=0.5)

    def after(self, step, reward):
        self.scheduler.step(reward)


class Greedy(Plateau):
    def schedule(self):
        from transformers import GreedyLR

        return GreedyLR(
            self.optimizer, mode="max", patience=5, min_lr=self.rate / 30, max_lr=self.rate * 30
        )


class ScheduleFree(Method):
    def make(self, parameters, rate):
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(parameters, lr=rate, warmup_steps=STEPS // 10)
        optimizer.train()
        return optimizer


class Prodigy(Method):
    """`rate` is the factor on the rate that Prodigy finds."""

    def make(self, parameters, rate):
        from prodigyopt import Prodigy

        return Prodigy(parameters, lr=rate, weight_decay=0.0)


class BangBang(Method):
    """The rule of rl_games, rsl_rl and skrl, at its target in nats a token."""

    target = 0.003
    steers = True

    def step(self, step, measure):
        self.optimizer.step()
        kl = measure()
        if not kl <= 2 * self.target:
            self.set(self.rate / 1.5)
        elif kl < self.target / 2:
            self.set(self.rate * 1.5)


class RandomWalk(Method):
    """Placebo: steps as large as the steering's usual ones, in random directions."""

    def after(self, step, reward):
        self.set(self.rate * math.exp(self.random.gauss(0, 0.15)))


class KLTarget(Method):
    """The program's default."""

    target, falls, brakes, learns = 0.004, True, True, True
    steers = True

    def __init__(self, parameters, rate, seed):
        super().__init__(parameters, rate, seed)
        self.region = TrustRegion()

    def share(self) -> float:
        """Of the target, by the evidence that updates lead uphill."""
        return self.region.confidence(alignment(self.optimizer)) if self.learns else 1.0

    def signal(self, kl: float) -> float:
        return kl

    def step(self, step, measure):
        left = (STEPS - step + 1) / STEPS if self.falls else 1.0
        target, factor = self.target * left * self.share(), 1.0
        update = LastUpdate(self.optimizer)
        self.optimizer.step()
        if self.brakes:
            factor, kl = self.region.fit(measure, update.rescale, target)
            self.braked += factor < 1
        else:
            kl = measure()
        self.set(kl_target(self.rate * factor, self.signal(kl), target))


class NoBrake(KLTarget):
    brakes = False


class Falling(KLTarget):
    """Without the evidence."""

    learns = False


class Fixed(Falling):
    """A target that does not fall either."""

    falls = False


class RandomEvidence(KLTarget):
    """Placebo: alignments of pure noise."""

    def share(self):
        return self.region.confidence(self.random.gauss(0, 0.02))


class ShuffledKL(NoBrake):
    """Placebo: steered by the KL of another step, drawn among those seen."""

    def signal(self, kl):
        self.seen = [*getattr(self, "seen", []), kl]
        return self.random.choice(self.seen)


METHODS: dict[str, tuple[type[Method], list[float]]] = {
    "kl_target": (KLTarget, DECADES),
    "constant": (Method, sorted({*DECADES, *SWEEP})),
    "warm-up + linear": (Linear, SWEEP),
    "cosine": (Cosine, SWEEP),
    "OneCycle": (OneCycle, SWEEP),
    "ReduceLROnPlateau": (Plateau, SWEEP),
    "GreedyLR": (Greedy, SWEEP),
    "Schedule-Free": (ScheduleFree, [1e-4, 3e-4, 1e-3, 3e-3]),
    "Prodigy": (Prodigy, [0.3, 1.0]),
    "bang-bang KL": (BangBang, FEW),
    "kl_target, target falls, no evidence": (Falling, [1e-4]),
    "kl_target, target fixed, no evidence": (Fixed, [1e-4]),
    "kl_target, no brake": (NoBrake, FEW),
    "placebo: random evidence": (RandomEvidence, [1e-4]),
    "placebo: KL of another step": (ShuffledKL, FEW),
    "placebo: random walk": (RandomWalk, [1e-4, 3e-4]),
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
        policy = Policy(lm, copy.deepcopy(self.first.lm).requires_grad_(False))
        sampler = Sampler(policy, self.tokenizer, temperature=TEMPERATURE)
        way = METHODS[method][0](list(policy.parameters()), rate, seed)
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
            reference = sampler.reference_logprobs(rollout)
            kl = kl_per_token(rollout.logprobs, reference).sum(-1)
            advantage, _ = advantages(
                reward - KL_COEF * kl, "rloo", group_size=GROUP, normalize=True
            )
            weights = token_weights(rollout.logprobs, rollout.completion_mask, advantage)
            gain, entropy = sampler.weighted_logprobs(rollout, weights)
            (-gain).backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            if norm.isfinite():
                way.step(step, partial(moved, sampler, rollout))
            way.optimizer.zero_grad()
            way.after(step, float((reward - KL_COEF * kl).mean()))
            trace.append(
                [round(float(x), 5) for x in (true.mean(), kl.mean(), entropy.sum() / BATCH)]
                + [float(f"{way.optimizer.param_groups[0]['lr']:.3g}")]
            )
        result = self.judge(task, sampler, way)
        result |= {"task": name, "method": method, "rate": rate, "seed": seed}
        result |= {"tokens": tokens, "seconds": round(time.perf_counter() - start, 2)}
        return result | {"braked": way.braked, "steps": len(trace), "trace": trace[::4]}

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
            kl = (rollout.logprobs - sampler.reference_logprobs(rollout)).sum(-1)
            scores.append((reward - KL_COEF * kl).mean().item())
            rewards.append(reward.mean().item())
            kls.append(kl.mean().item())
            entropies.append(-(rollout.logprobs.sum() / rollout.completion_mask.sum()).item())
        names, columns = ("score", "reward", "kl", "entropy"), (scores, rewards, kls, entropies)
        return {n: round(statistics.mean(c), 5) for n, c in zip(names, columns, strict=True)}


def moved(sampler: Sampler, rollout: Rollout) -> float:
    """The KL of the last update on a few of the completions, nats a token."""
    part = rollout.part(torch.arange(0, BATCH, BATCH // PROBE))
    now = sampler.policy.logprobs(part, sampler.temperature)
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


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# The report


def middle(scores: list[float]) -> float:
    """The interquartile mean: of five, the middle three."""
    cut = len(scores) // 4
    return statistics.mean(sorted(scores)[cut : len(scores) - cut])


def interval(scores: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 %, by drawing seeds with replacement."""
    chance = random.Random(0)
    found = sorted(middle(chance.choices(scores, k=len(scores))) for _ in range(draws))
    return found[int(0.025 * draws)], found[int(0.975 * draws) - 1]


def score_of(row: dict[str, Any], floor: float) -> float:
    """A policy without finite probabilities has no score; it counts as the worst there was."""
    return floor if row["score"] is None else row["score"]


def report(rows: list[dict[str, Any]]) -> str:
    """Tables in Markdown."""
    lines: list[str] = []
    shares: dict[float, list[float]] = {rate: [] for rate in DECADES}
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        floor = min(row["score"] for row in own if row["score"] is not None)
        start = middle([r["score"] for r in own if (r["method"], r["rate"]) == ("constant", 1e-7)])
        cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for row in own:
            cells.setdefault((row["method"], row["rate"]), []).append(row)

        def iqm(key: tuple[str, float], cells: Any = cells, floor: float = floor) -> float:
            return middle([score_of(row, floor) for row in cells[key]])

        def fell(row: dict[str, Any], start: float = start) -> bool:
            return row["score"] is None or row["entropy"] < 0.1 or row["score"] < start - 0.1

        lines += [
            f"### {task}",
            "",
            f"Untrained: {start:.3f}.",
            "",
            "| method | best rate | score there [95 %] | KL | worst rate tried | score there "
            "| collapsed | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        bests = {}
        for method in METHODS:
            keys = sorted((key for key in cells if key[0] == method), key=iqm)
            if not keys:
                continue
            best, worst = keys[-1], keys[0]
            bests[method] = iqm(best), middle([row["kl"] for row in cells[best]])
            low, high = interval([score_of(row, floor) for row in cells[best]])
            all_runs = [row for key in keys for row in cells[key]]
            lines.append(
                f"| {method} | {best[1]:g} | {iqm(best):.3f} [{low:.3f}, {high:.3f}] "
                f"| {bests[method][1]:.1f} | {worst[1]:g} | {iqm(worst):.3f} "
                f"| {sum(map(fell, all_runs))} of {len(all_runs)} "
                f"| {statistics.median(row['seconds'] for row in all_runs):.1f} |"
            )
        rivals = {m: b for m, b in bests.items() if not m.startswith(("kl_target", "placebo"))}
        rival = max(rivals, key=lambda method: rivals[method][0])
        lines += [
            "",
            f"`kl_target` by start rate, beside the best baseline ({rival}, "
            f"{rivals[rival][0]:.3f} at a KL of {rivals[rival][1]:.1f}):",
            "",
            "| start rate | score [95 %] | of the best | KL |",
            "|---|---|---|---|",
        ]
        for rate in DECADES:
            runs = cells["kl_target", rate]
            low, high = interval([score_of(row, floor) for row in runs])
            share = iqm(("kl_target", rate)) / rivals[rival][0]
            shares[rate].append(share)
            lines.append(
                f"| {rate:g} | {iqm(('kl_target', rate)):.3f} [{low:.3f}, {high:.3f}] "
                f"| {share:.1%} | {middle([row['kl'] for row in runs]):.1f} |"
            )
        lines.append("")
    mean = [statistics.mean(share) for share in shares.values()]
    lines.append(
        f"Mean over tasks and start rates: {statistics.mean(mean):.1%} of each task's best "
        f"baseline; the worst start rate has {min(mean):.1%}."
    )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(4 * len(names), 4), layout="constrained")
    colours = dict(zip(METHODS, [f"C{k}" for k in range(10)] + ["olive", "navy"] * 5, strict=False))
    for axes, task in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for method in METHODS:
            if method.startswith("placebo") or len(METHODS[method][1]) < 3:
                continue  # Prodigy's rate is another thing
            points = {}
            for rate in METHODS[method][1]:
                scores = [
                    max(score_of(row, -9.0), -0.5)
                    for row in rows
                    if (row["task"], row["method"], row["rate"]) == (task, method, rate)
                ]
                if scores:
                    points[rate] = middle(scores)
            style: dict[str, Any] = {"linewidth": 1, "marker": ".", "color": colours[method]}
            if method == "kl_target":
                style = {"linewidth": 3, "marker": "o", "color": "black", "zorder": 3}
            axes.plot(list(points), list(points.values()), label=method, **style)
        axes.set(xscale="log", xlabel="start rate", title=task)
    figure.axes[0].set_ylabel("score, at least −0.5")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=["length", "sparse", "noisy"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--rates", nargs="*", type=float, help="instead of each method's own")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--report", action="store_true", help="only report what there is")
    args = parser.parse_args()
    jobs = [
        (task, method, rate, seed)
        for seed in args.seeds
        for task in args.tasks
        for method in args.methods
        for rate in args.rates or METHODS[method][1]
    ]
    if not args.report:
        run_all(jobs, args.results, args.processes)
    rows = read(args.results)
    text = report(rows)
    args.results.with_suffix(".md").write_text(text)
    plot(rows, args.results.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
