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
from adaptiverl.optim.online import OnlineAdamW, recurrent
from adaptiverl.optim.online.optimizers import FEATURES
from adaptiverl.optim.trust_region import TrustRegion

STEPS = 60
DECADES = [10.0**k for k in range(-7, 1)]
SWEEP = [3e-5, 1e-4, 3e-4, 1e-3]
FEW = [1e-7, 1e-4, 1e-1]


class Method:
    """AdamW at a constant rate; what the others derive from."""

    steers = False  # whether the KL of each update is measured

    def __init__(self, parameters: list, rate: float, seed: int):
        self.rate, self.optimizer = rate, self.make(parameters, rate)
        self.scheduler = self.schedule()
        self.random = random.Random(seed)
        self.updates_scaled = 0  # updates that were scaled down
        self.loss = 0.0  # of the step that is being made

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

    target, falls = 0.004, True
    kind: type[TrustRegion] = TrustRegion
    steers = True

    def __init__(self, parameters, rate, seed):
        super().__init__(parameters, rate, seed)
        steps = STEPS if self.falls else None
        self.region = self.kind(self.optimizer, kl=self.target, steps=steps)
        if isinstance(self.region, _Placebo):
            self.region.random = self.random

    def step(self, step, measure):
        self.info = self.region.step(measure)
        self.updates_scaled += self.info.scale < 1

    @property
    def next_rate(self) -> float:
        return self.rate * self.region.ratio


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
            loss=self.loss, reward=reward, kl=self.info.kl, kl_target=self.info.target,
            done=step / STEPS,
        )  # fmt: skip


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

    def __init__(self, parameters, rate, seed):
        super().__init__(parameters, rate, seed)
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

    def __init__(self, parameters, rate, seed):
        super().__init__(parameters, rate, seed)
        self.adaptive = AdaptiveOptimizer(self.optimizer, lr_rule="learned", steps=STEPS)

    def step(self, step, measure):
        self.adaptive.observe(loss=self.loss)
        self.adaptive.step(measure_kl=measure)

    @property
    def next_rate(self) -> float:
        return self.adaptive.lr

    def after(self, step, reward):
        self.adaptive.observe(reward=reward)


SPREAD = 0.6  # of log scales: the standard deviation of the trained GRU's on the tuning task


def with_target(
    kind: type[InTrustRegion], target: float
) -> tuple[type[InTrustRegion], list[float]]:
    return type(kind.__name__, (kind,), {"target": target}), [1e-4]


# What the defaults were chosen among, on the two sentiment tasks and seeds 100 to 102
TUNING = {
    "constant": (Method, SWEEP),
    "0.0005, falling": with_target(Falling, 0.0005),
    "0.001, falling": with_target(Falling, 0.001),
    "0.003, falling": with_target(Falling, 0.003),
    "0.002, fixed": with_target(Fixed, 0.002),
    "0.003, by signal-to-noise": with_target(InTrustRegion, 0.003),
    "0.004, by signal-to-noise": with_target(InTrustRegion, 0.004),
}
OURS = ("trust_region", "OnlineAdamW", "placebo", "LR_RULE learned")
ONLINE = {
    "trust_region": (InTrustRegion, [1e-4]),
    "OnlineAdamW": (Online, [1e-4]),
    "placebo: frozen GRU": (Frozen, [1e-4]),
    "placebo: untrained GRU": (Untrained, [1e-4]),
    "placebo: shuffled features": (ShuffledFeatures, [1e-4]),
    "placebo: random scales": (RandomScales, [1e-4]),
    "LR_RULE learned": (LearnedRate, [1e-5, 1e-4, 1e-3]),
}
METHODS: dict[str, tuple[type[Method], list[float]]] = {
    "trust_region": (InTrustRegion, DECADES),
    "constant": (Method, sorted({*DECADES, *SWEEP})),
    "warm-up + linear": (Linear, SWEEP),
    "cosine": (Cosine, SWEEP),
    "OneCycle": (OneCycle, SWEEP),
    "ReduceLROnPlateau": (Plateau, SWEEP),
    "GreedyLR": (Greedy, SWEEP),
    "Schedule-Free": (ScheduleFree, [1e-4, 3e-4, 1e-3, 3e-3]),
    "Prodigy": (Prodigy, [0.3, 1.0]),
    "bang-bang KL": (BangBang, FEW),
    "trust_region, linear target, full confidence": (Falling, [1e-4]),
    "trust_region, constant target, full confidence": (Fixed, [1e-4]),
    "trust_region, no line search": (NoLineSearch, FEW),
    "placebo: random signal-to-noise": (RandomEvidence, [1e-4]),
    "placebo: KL of another step": (ShuffledKL, FEW),
    "placebo: random walk": (RandomWalk, [1e-4, 3e-4]),
}
