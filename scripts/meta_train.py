"""Trains the GRUs of OnlineSGD, OnlineRMSProp, OnlineAdamW and of the rule "learned" beforehand.

    python scripts/meta_train.py        writes adaptiverl/assets/online.safetensors and a log beside

On contextual bandits: a small network of embeddings, layer norms and residual blocks chooses one of
some actions, REINFORCE with four tries a context, as train.py has it; the optimizer's start rate is
off by up to two decades either way. The GRU over tensors learns as it does in use, by the one-step
hypergradient, through one task after the other, in a trust region. The rule
"learned" has no short-sighted signal that is good enough: evolution strategies (antithetic pairs,
common random numbers, Adam), the fitness being the expected reward at the end. A process each, a
quarter of an hour on two cores. Both are judged on 64 tasks that are not trained on.
"""

import argparse
import json
import math
import multiprocessing
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adaptiverl.optim.adaptive import AdaptiveOptimizer
from adaptiverl.optim.online import OnlineAdamW, learned, optimizers, recurrent

STEPS, CONTEXTS, TRIES, PROBES = 40, 16, 4, 32
LIVES, META_LR = 400, 0.01  # of the GRU over tensors; three times as fast as in use
GENERATIONS, PAIRS, TASKS, SIGMA, RATE = 50, 6, 4, 0.1, 0.03  # of the rule "learned"
CHECKED = range(10_000, 10_064)  # tasks that nothing is trained on
OUT = Path(__file__).parent.parent / "adaptiverl/assets/online.safetensors"


class Block(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(size), nn.Linear(size, 4 * size)
        self.down = nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Bandit:
    """Contexts of three words, of which a hidden table names the right action."""

    def __init__(self, seed: int):
        chance = random.Random(seed)
        self.draw = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.words, self.actions = chance.choice([8, 16, 32]), chance.choice([4, 8, 16])
        size = chance.choice([8, 16, 24])
        self.embed = nn.Embedding(self.words, size)
        self.place = nn.Parameter(0.1 * torch.randn(3, size))
        self.blocks = nn.Sequential(*[Block(size) for _ in range(chance.choice([1, 2, 3]))])
        self.head = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, self.actions))
        modules = nn.ModuleList([self.embed, self.blocks, self.head])
        self.named = [("place", self.place), *modules.named_parameters()]
        self.table = torch.randn(3, self.words, self.actions, generator=self.draw)
        self.noise = chance.choice([0.0, 0.0, 0.5])
        self.rate = 1e-3 * 10 ** chance.uniform(-2, 2)
        self.probe = self.contexts(PROBES)

    def contexts(self, count: int) -> Tensor:
        return torch.randint(self.words, (count, 3), generator=self.draw)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.blocks((self.embed(x) + self.place).mean(1)))

    def right(self, x: Tensor) -> Tensor:
        return self.table[torch.arange(3), x].sum(1).argmax(-1)

    def loss(self) -> tuple[Tensor, float]:
        """REINFORCE's on fresh contexts, and the mean reward."""
        x = self.contexts(CONTEXTS).repeat_interleave(TRIES, 0)
        logprobs = self.logits(x).log_softmax(-1)
        action = torch.multinomial(logprobs.detach().exp(), 1, generator=self.draw)[:, 0]
        reward = (action == self.right(x)).float()
        seen = reward + self.noise * torch.randn(len(x), generator=self.draw)
        groups = seen.view(-1, TRIES)
        advantage = (groups - groups.mean(1, keepdim=True)).flatten() * TRIES / (TRIES - 1)
        advantage = advantage / (advantage.square().mean().sqrt() + 1e-4)
        chosen = logprobs.gather(1, action[:, None])[:, 0]
        return -(advantage * chosen).mean(), reward.mean().item()

    @torch.no_grad()
    def fitness(self) -> float:
        """The expected reward, of contexts that are the same for all."""
        draw = torch.Generator().manual_seed(1)
        x = torch.randint(self.words, (512, 3), generator=draw)
        return self.logits(x).softmax(-1).gather(1, self.right(x)[:, None]).mean().item()


def lived(seed: int, weights: recurrent.Weights) -> recurrent.Weights:
    """What the GRU over tensors has made of its weights by the end of a task."""
    task = Bandit(seed)
    optimizer = _online(task, weights)
    optimizer.learning = {"rate": META_LR, "anchor_decay": 1.0}
    _train(task, "trust_region", optimizer)
    return optimizer.weights


def live(seed: int, kind: str, weights: recurrent.Weights | None) -> float:
    """One task from its beginning to its end; weights None is what the GRU is compared with."""
    task = Bandit(seed)
    if kind == "tensors" and weights is not None:
        optimizer: Any = _online(task, weights)
    else:
        optimizer = torch.optim.AdamW([p for _, p in task.named], lr=task.rate, weight_decay=0.0)
    rule = "trust_region" if kind == "tensors" else "none" if weights is None else "learned"
    return _train(task, rule, optimizer, weights if rule == "learned" else None)


def _online(task: Bandit, weights: recurrent.Weights) -> OnlineAdamW:
    optimizer = OnlineAdamW(task.named, lr=task.rate, weight_decay=0.0, weights=None)
    optimizer.place(weights)
    return optimizer


def _train(
    task: Bandit, rule: str, base: torch.optim.Optimizer, weights: recurrent.Weights | None = None
) -> float:
    """The fitness that `base` reaches under `rule`; `weights` are those of the rule "learned"."""
    target: dict[str, Any] = {} if rule == "none" else {"trust_region_kl": 0.02}
    optimizer = AdaptiveOptimizer(base, rule, steps=STEPS, **target)
    if optimizer.learned and weights is not None:
        optimizer.learned.place(weights)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, reward = task.loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in task.named], 1.0).item()
        with torch.no_grad():
            before = task.logits(task.probe).log_softmax(-1)

        @torch.no_grad()
        def measure_kl(before: Tensor = before) -> float:
            after = task.logits(task.probe).log_softmax(-1)
            return (before.exp() * (before - after)).sum(-1).mean().item()

        optimizer.observe(loss=loss.item(), reward=reward, grad_norm=norm)
        optimizer.step(measure_kl=measure_kl)
    score = task.fitness()
    return score if math.isfinite(score) else 0.0


def shaped(flat: Tensor, like: recurrent.Weights) -> recurrent.Weights:
    parts = flat.split([w.numel() for w in like.values()])
    return {k: part.view(w.shape) for (k, w), part in zip(like.items(), parts, strict=True)}


class Judge:
    """Compares weights with none, on tasks that are not trained on, and logs it."""

    def __init__(self, kind: str, file: Any):
        self.kind, self.file, self.start = kind, file, time.time()
        self.plain = [live(seed, kind, None) for seed in CHECKED]

    def __call__(self, done: int, weights: recurrent.Weights) -> float:
        """The mean gain in expected reward."""
        now = [live(seed, self.kind, weights) for seed in CHECKED]
        gains = [a - b for a, b in zip(now, self.plain, strict=True)]
        row = {
            "kind": self.kind,
            "after": done,
            "minutes": (time.time() - self.start) / 60,
            "plain": statistics.mean(self.plain),
            "gain": statistics.mean(gains),
            "standard_error": statistics.stdev(gains) / math.sqrt(len(gains)),
        }
        row = {k: round(x, 4) if isinstance(x, float) else x for k, x in row.items()}
        print(json.dumps(row), file=self.file, flush=True)
        return statistics.mean(gains)


def by_hypergradient(judge: Judge) -> recurrent.Weights:
    """One life after the other, each beginning with what the last one learned."""
    weights = recurrent.fresh(optimizers.FEATURES)
    for seed in range(LIVES):
        weights = lived(seed, weights)
        if (seed + 1) % 100 == 0:
            judge(seed + 1, weights)
    return weights


def by_evolution(judge: Judge) -> recurrent.Weights:
    """The last generation's mean: which one is best on CHECKED is not looked at."""
    like = recurrent.fresh(learned.FEATURES)
    mean = torch.cat([w.flatten() for w in like.values()])
    chance = torch.Generator().manual_seed(0)
    m, v = torch.zeros_like(mean), torch.zeros_like(mean)
    for generation in range(1, GENERATIONS + 1):
        seeds = [(generation - 1) * TASKS + k for k in range(TASKS)]
        total = torch.zeros_like(mean)
        for _ in range(PAIRS):
            noise = torch.randn(mean.shape, generator=chance)
            for seed in seeds:
                up, down = (
                    live(seed, "rate", shaped(mean + sign * SIGMA * noise, like))
                    for sign in (1, -1)
                )
                total += (up - down) * noise
        gradient = total / (2 * SIGMA * PAIRS * TASKS)
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        step = (m / (1 - 0.9**generation)) / ((v / (1 - 0.99**generation)).sqrt() + 1e-12)
        mean = mean + RATE * step
        if generation % 10 == 0:
            judge(generation, shaped(mean, like))
    return {k: w.clone() for k, w in shaped(mean, like).items()}


def work(kind: str, out: str) -> None:
    torch.set_num_threads(1)
    with Path(f"{out}.{kind}.jsonl").open("w") as file:
        train = by_hypergradient if kind == "tensors" else by_evolution
        save_file(train(Judge(kind, file)), f"{out}.{kind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    kinds = ("tensors", "rate")
    jobs = [spawn.Process(target=work, args=(kind, str(arguments.out))) for kind in kinds]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    tensors: recurrent.Weights = {}
    log = []
    for kind in kinds:
        part = Path(f"{arguments.out}.{kind}")
        tensors |= {f"{kind}.{name}": w for name, w in load_file(part).items()}
        log += [json.loads(line) for line in Path(f"{part}.jsonl").read_text().splitlines()]
        part.unlink()
        Path(f"{part}.jsonl").unlink()
    save_file(tensors, arguments.out)
    arguments.out.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
