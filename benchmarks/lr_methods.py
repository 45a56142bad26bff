"""Every way of setting the rate that lr_robustness.py compares: baselines, ours, placebos.

Each is called after a step with what was seen, and sets the next step's rate.
"""

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from adaptiverl.optim import recurrent
from adaptiverl.optim.controller import Controller
from adaptiverl.optim.online import FEATURES, OnlineAdamW
from adaptiverl.optim.rules import kl_target
from adaptiverl.optim.trust_region import LastUpdate, TrustRegion, alignment

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
        self.region, self.braked = TrustRegion(settled=True), 0
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
        self.moved = kl, target


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


class Online(KLTarget):
    """The rate by kl_target, each tensor's updates by OnlineAdamW with its defaults."""

    kind: type[OnlineAdamW] = OnlineAdamW
    learns_online = True

    def make(self, parameters, rate):
        return self.kind(parameters, lr=rate, weight_decay=0.0, learn=self.learns_online)

    def after(self, step, reward):
        kl, target = self.moved
        self.optimizer.observe(
            loss=self.loss, reward=reward, kl=kl, kl_target=target, done=step / STEPS
        )


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
        self._place(weights, weights)


class Untrained(Frozen):
    """Placebo: a GRU of random weights, with a head as long as the trained one's."""

    kind = _Untrained


class _Shuffled(OnlineAdamW):
    def _features(self, *arguments):
        x = super()._features(*arguments)
        return x[torch.randperm(len(x), generator=self.chance)]


class ShuffledFeatures(Online):
    """Placebo: each tensor is told of another one."""

    kind = _Shuffled

    def __init__(self, parameters, rate, seed):
        super().__init__(parameters, rate, seed)
        self.optimizer.chance = torch.Generator().manual_seed(seed)


class _Walk(OnlineAdamW):
    def _answer(self, x):
        """As far from 1 as the trained GRU goes."""
        noise = torch.randn(len(x), generator=self.chance)
        self.walk = 0.95 * getattr(self, "walk", 0.0) + SPREAD * math.sqrt(1 - 0.95**2) * noise
        return self.walk - self.walk.mean(), self.hidden


class RandomScales(ShuffledFeatures):
    """Placebo: scales that walk at random."""

    kind = _Walk


class LearnedRate(Method):
    """The rule "learned" moves the rate; no brake, no target in the end."""

    steers = True

    def __init__(self, parameters, rate, seed):
        super().__init__(parameters, rate, seed)
        self.control = Controller(self.optimizer, lr_rule="learned", steps=STEPS)

    def step(self, step, measure):
        aligned = alignment(self.optimizer)
        self.optimizer.step()
        self.control.observe(kl=measure(), alignment=aligned)

    def after(self, step, reward):
        self.control.observe(loss=self.loss, reward=reward)
        self.control.tick()


SPREAD = 0.6  # of log scales: the standard deviation of the trained GRU's on the tuning task


def with_target(kind: type[KLTarget], target: float) -> tuple[type[KLTarget], list[float]]:
    return type(kind.__name__, (kind,), {"target": target}), [1e-4]


# What the defaults were chosen among, on the two sentiment tasks and seeds 100 to 102
TUNING = {
    "constant": (Method, SWEEP),
    "0.0005, falling": with_target(Falling, 0.0005),
    "0.001, falling": with_target(Falling, 0.001),
    "0.003, falling": with_target(Falling, 0.003),
    "0.002, fixed": with_target(Fixed, 0.002),
    "0.003, by evidence": with_target(KLTarget, 0.003),
    "0.004, by evidence": with_target(KLTarget, 0.004),
}
OURS = ("kl_target", "OnlineAdamW", "placebo", "LR_RULE learned")
ONLINE = {
    "kl_target": (KLTarget, [1e-4]),
    "OnlineAdamW": (Online, [1e-4]),
    "placebo: frozen GRU": (Frozen, [1e-4]),
    "placebo: untrained GRU": (Untrained, [1e-4]),
    "placebo: shuffled features": (ShuffledFeatures, [1e-4]),
    "placebo: random scales": (RandomScales, [1e-4]),
    "LR_RULE learned": (LearnedRate, [1e-5, 1e-4, 1e-3]),
}
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
