"""Every way of setting the rate that lr_robustness.py compares: baselines, ours, placebos.

Each makes a step and is told its reward. The trust region is the one that ships; its variants are
subclasses that override its public methods.
"""

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from adaptiverl.optim.adaptive import AdaptiveOptimizer
from adaptiverl.optim.mini import AdamMini
from adaptiverl.optim.online import Online as OnlineOptimizer
from adaptiverl.optim.online import OnlineAdamW, recurrent
from adaptiverl.optim.online.optimizers import FEATURES
from adaptiverl.optim.trust_region import TrustRegion

START = [1e-7, 1e-3, 1.0]  # of our rates; 1e-3 is what "auto" begins with
DECADES = [10.0**k for k in range(-7, 1)]
SWEEP = [3e-5, 1e-4, 3e-4, 1e-3]
FEW = [1e-7, 1e-4, 1e-1]


class Method:
    """AdamW at a constant rate; what the others derive from."""

    steers = False  # whether the KL of each update is measured

    def __init__(self, parameters: list, rate: float, seed: int, steps: int):
        self.steps = steps
        self.rate, self.optimizer = rate, self.make(parameters, rate)
        self.scheduler = self.schedule()
        self.random = random.Random(seed)
        self.updates_scaled = 0  # updates that were scaled down
        self.loss, self.informative = 0.0, True  # of the step that is being made
        self.sum_kl = 0.0  # of all updates, nats per token, where it is measured

    def make(self, parameters: list, rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    def schedule(self) -> Any:
        return None

    def step(self, step: int, measure: Callable[[], float]) -> None:
        self.optimizer.step()

    def after(self, step: int, reward: float) -> None:
        if self.scheduler:
            self.scheduler.step()

    @property
    def next_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def set(self, rate: float) -> None:
        self.rate = min(max(rate, 1e-9), 10.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate


class Linear(Method):
    def schedule(self):
        warm, steps = max(self.steps // 10, 1), self.steps
        return torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda t: min((t + 1) / warm, (steps - t) / (steps - warm))
        )


class Cosine(Method):
    def schedule(self):
        return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)


class OneCycle(Method):
    def schedule(self):
        return torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=self.rate, total_steps=self.steps + 1
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

        optimizer = AdamWScheduleFree(parameters, lr=rate, warmup_steps=self.steps // 10)
        optimizer.train()
        return optimizer


class Prodigy(Method):
    """`rate` is the factor on the rate that Prodigy finds."""

    def make(self, parameters, rate):
        from prodigyopt import Prodigy

        return Prodigy(parameters, lr=rate, weight_decay=0.0)


class BangBang(Method):
    """The rule of rl_games, rsl_rl and skrl, at its target in nats per token."""

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


class InTrustRegion(Method):
    """The program's default."""

    target: float | None = None  # the default
    falls = True
    kind: type[TrustRegion] = TrustRegion
    steers = True

    def __init__(self, parameters, rate, seed, steps):
        super().__init__(parameters, rate, seed, steps)
        self.region = self.kind(self.optimizer, kl=self.target, steps=steps if self.falls else None)
        if isinstance(self.region, _Placebo):
            self.region.random = self.random

    def make(self, parameters, rate):
        return AdamMini(parameters, lr=rate, weight_decay=0.0)

    def step(self, step, measure):
        self.info = self.region.step(measure, informative=self.informative)
        self.updates_scaled += self.info.scale < 1
        self.sum_kl += self.info.kl or 0.0

    @property
    def next_rate(self) -> float:
        return self.rate * self.region.ratio


class WithAdamW(InTrustRegion):
    """AdamW, whose second moments are per element."""

    make = Method.make


class Mini(Method):
    """AdamMini at a constant rate."""

    make = InTrustRegion.make


class _Placebo(TrustRegion):
    random = random.Random(0)


class _NoLineSearch(_Placebo):
    def line_search(self, measure_kl, rescale, target, max_scale=math.inf):
        return 1.0, measure_kl()


class _Certain(TrustRegion):
    confidence = 1.0


class _RandomEvidence(_Placebo):
    def observe_alignment(self, cosine):
        super().observe_alignment(self.random.gauss(0, 0.02))


class _ShuffledKL(_NoLineSearch):
    def steer(self, base, kl, target):
        self.seen = [*getattr(self, "seen", []), kl]
        super().steer(base, self.random.choice(self.seen), target)


class NoLineSearch(InTrustRegion):
    kind = _NoLineSearch


class Falling(InTrustRegion):
    """Without the signal-to-noise ratio."""

    kind = _Certain


class Fixed(Falling):
    """A target that does not fall either."""

    falls = False


class RandomEvidence(InTrustRegion):
    """Placebo: alignments of pure noise."""

    kind = _RandomEvidence


class ShuffledKL(NoLineSearch):
    """Placebo: steered by the KL of another step, drawn among those seen."""

    kind = _ShuffledKL


class Online(InTrustRegion):
    """The rate by the trust region, each tensor's updates by OnlineAdamW with its defaults."""

    optimizer_kind: type[OnlineAdamW] = OnlineAdamW
    learns_online = True

    def make(self, parameters, rate):
        return self.optimizer_kind(parameters, lr=rate, weight_decay=0.0, learn=self.learns_online)

    def after(self, step, reward):
        self.optimizer.observe(
            loss=self.loss, reward=reward, kl=self.info.kl, trust_region_kl=self.info.target,
            done=step / self.steps,
        )  # fmt: skip


class _OnlineMini(OnlineOptimizer, AdamMini):
    torch_class = AdamMini


class OnlineMini(Online):
    """The GRU over AdamMini."""

    def make(self, parameters, rate):
        return _OnlineMini(parameters, lr=rate, weight_decay=0.0)


class Frozen(Online):
    """Placebo: the trained GRU, which learns nothing any more."""

    learns_online = False


class _Untrained(OnlineAdamW):
    def __init__(self, params, **arguments):
        super().__init__(params, **arguments | {"weights": None})
        weights = recurrent.fresh(FEATURES)
        head = recurrent.trained("tensors")["head"]
        chance = torch.Generator().manual_seed(0)
        weights["head"] = head[torch.randperm(len(head), generator=chance)]
        self.place(weights)


class Untrained(Frozen):
    """Placebo: a GRU of random weights, with a head as long as the trained one's."""

    optimizer_kind = _Untrained


class _Shuffled(OnlineAdamW):
    def features(self, *arguments):
        x = super().features(*arguments)
        return x[torch.randperm(len(x), generator=self.chance)]


class ShuffledFeatures(Online):
    """Placebo: each tensor gets the features of another one."""

    optimizer_kind = _Shuffled

    def __init__(self, parameters, rate, seed, steps):
        super().__init__(parameters, rate, seed, steps)
        self.optimizer.chance = torch.Generator().manual_seed(seed)


class _Walk(OnlineAdamW):
    def answer(self, x):
        """As far from 1 as the trained GRU goes."""
        noise = torch.randn(len(x), generator=self.chance)
        self.walk = 0.95 * getattr(self, "walk", 0.0) + SPREAD * math.sqrt(1 - 0.95**2) * noise
        return self.walk - self.walk.mean(), self.hidden


class RandomScales(ShuffledFeatures):
    """Placebo: scales that walk at random."""

    optimizer_kind = _Walk


class LearnedRate(Method):
    """The rule "learned" moves the rate; no line search, and its target falls."""

    steers = True

    def __init__(self, parameters, rate, seed, steps):
        super().__init__(parameters, rate, seed, steps)
        self.adaptive = AdaptiveOptimizer(self.optimizer, lr_rule="learned", steps=steps)

    def step(self, step, measure):
        self.adaptive.observe(loss=self.loss)
        self.adaptive.step(measure_kl=measure)

    @property
    def next_rate(self) -> float:
        return self.adaptive.lr

    def after(self, step, reward):
        self.adaptive.observe(reward=reward)


class Ruled(Method):
    """AdamW under rules of the library, with their defaults; it sees loss, reward and gradient."""

    rules: dict[str, str]

    def __init__(self, parameters, rate, seed, steps):
        super().__init__(parameters, rate, seed, steps)
        self.adaptive = AdaptiveOptimizer(self.optimizer, steps=steps, **self.rules)
        self.reward: float | None = None

    def step(self, step, measure):
        self.adaptive.observe(loss=self.loss, reward=self.reward)
        self.adaptive.step()

    @property
    def next_rate(self) -> float:
        return self.adaptive.lr

    def after(self, step, reward):
        self.reward = reward


def ruled(**rules: str) -> tuple[type[Method], list[float]]:
    return type("Ruled", (Ruled,), {"rules": rules}), [1e-4, 3e-4]


SPREAD = 0.6  # of log scales: the standard deviation of the trained GRU's on the tuning task
HALF_DECADES = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
OURS = ("trust_region", "OnlineAdamW", "placebo", "LR_RULE learned", "ours")
REGIMES = {
    "trust_region": (InTrustRegion, START),
    "constant": (Method, HALF_DECADES),
    "ours: AdamW in the trust region": (WithAdamW, [1e-3]),
    "ours: AdamMini, constant": (Mini, HALF_DECADES[:3]),
    "rule trend": ruled(lr_rule="trend"),
    "rule variance": ruled(lr_rule="variance"),
    "rule patience": ruled(lr_rule="patience"),
    "rule cosine_restart": ruled(lr_rule="cosine_restart"),
    "rule trend + variance + cosine": ruled(lr_rule="trend+variance+cosine"),
    "reward rule trend": ruled(reward_rule="trend"),
    "reward rule scaling": ruled(reward_rule="scaling"),
    "reward rule kelly": ruled(reward_rule="kelly"),
}
ONLINE = {
    "trust_region": (WithAdamW, [1e-4]),
    "OnlineAdamW": (Online, [1e-4]),
    "placebo: frozen GRU": (Frozen, [1e-4]),
    "placebo: untrained GRU": (Untrained, [1e-4]),
    "placebo: shuffled features": (ShuffledFeatures, [1e-4]),
    "placebo: random scales": (RandomScales, [1e-4]),
    "LR_RULE learned": (LearnedRate, [1e-5, 1e-4, 1e-3]),
    "AdamMini": (InTrustRegion, [1e-3]),
    "OnlineMini": (OnlineMini, [1e-3]),
}
METHODS: dict[str, tuple[type[Method], list[float]]] = {
    "trust_region": (InTrustRegion, START),
    "constant": (Method, sorted({*DECADES, *SWEEP})),
    "warm-up + linear": (Linear, SWEEP),
    "cosine": (Cosine, SWEEP),
    "OneCycle": (OneCycle, SWEEP),
    "ReduceLROnPlateau": (Plateau, SWEEP),
    "GreedyLR": (Greedy, SWEEP),
    "Schedule-Free": (ScheduleFree, [1e-4, 3e-4, 1e-3, 3e-3]),
    "Prodigy": (Prodigy, [0.3, 1.0]),
    "bang-bang KL": (BangBang, FEW),
    "trust_region, AdamW": (WithAdamW, [1e-3]),
    "trust_region, linear target, full confidence": (Falling, [1e-3]),
    "trust_region, constant target, full confidence": (Fixed, [1e-3]),
    "trust_region, no line search": (NoLineSearch, START),
    "placebo: random signal-to-noise": (RandomEvidence, [1e-3]),
    "placebo: KL of another step": (ShuffledKL, [1e-3]),
    "placebo: random walk": (RandomWalk, [1e-4, 3e-4]),
}
