"""The trust region: how far an update may move the policy, held inside the step that makes it.

KL ≈ ½ lr² uᵀFu, so an update that went too far is right once it is scaled by sqrt(target / KL). A
policy that has collapsed does not come back: the brake must act before the next sample.
Leaves out how KL is measured (the caller's) and the rate of the next step (rules.kl_target).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

FAR = 2.0  # an update this many times the target is shrunk
STRIDE = 30.0  # the largest change between two measurements; KL ≈ lr² is a law for small steps
TRIES = 12
MEMORY = 0.96  # of the evidence, a step
SURE = 4.0  # standard errors at which the whole target is used
LEAST = 0.1  # of it, however little evidence there is


@dataclass
class TrustRegion:
    """Finds the scale of an update at which its KL meets the target, and how large that may be.

    `settled` is whether an update has been measured before. The first is also made larger where it
    falls short: a rate a thousand times too small is then as good as any. The rest is the evidence
    that updates lead uphill: weighted sums of what `alignment` gave.
    """

    settled: bool = False
    weight: float = 0.0
    weight2: float = 0.0
    mean: float = 0.0
    spread: float = 0.0

    def confidence(self, aligned: float | None) -> float:
        """The share of the target that the evidence allows, LEAST to 1, after one more `alignment`.

        Where rewards are mostly noise, gradients of fresh samples do not agree with the last
        update, and a fixed target would be spent on noise.
        """
        if aligned is not None and math.isfinite(aligned):
            self.weight = MEMORY * self.weight + 1
            self.weight2 = MEMORY**2 * self.weight2 + 1
            off = aligned - self.mean
            self.mean += off / self.weight
            self.spread = MEMORY * self.spread + off * (aligned - self.mean)
        return min(max(self.evidence / SURE, LEAST), 1.0)

    @property
    def evidence(self) -> float:
        """By how many standard errors the mean of recent alignments is above 0."""
        if self.weight <= 4 or not self.spread > 0:
            return 0.0
        variance = self.spread / self.weight * self.weight2 / self.weight**2
        return self.mean / math.sqrt(variance)

    def fit(
        self,
        measure: Callable[[], float],
        rescale: Callable[[float], None],
        target: float,
        most: float = math.inf,
    ) -> tuple[float, float]:
        """The factor that the update was scaled by, at most `most`, and its KL at that scale.

        `measure()` is the KL of the update as it is now, `rescale(s)` multiplies the update by s.
        The search keeps the largest scale within bounds and the smallest beyond, and bisects
        where the quadratic law leads out of that bracket: the KL of a mixture of experts jumps.
        An update that no scale brings within bounds is taken back: rescale(0), and a KL of 0.
        """
        factor, kl = 1.0, measure()
        within, kl_within, beyond = 0.0, 0.0, math.inf
        for _ in range(TRIES):
            far = not kl <= FAR * target  # NaN is far
            short = not self.settled and kl < target / FAR and factor < most
            if far:
                beyond = factor
            else:
                within, kl_within = factor, kl
            if not far and not short:
                break
            # Of an infinite or undefined KL it is known only that the step was too large.
            ratio = 0.0 if math.isnan(kl) else target / kl if kl > 0 else math.inf
            change = min(max(math.sqrt(ratio), 1 / STRIDE), STRIDE, most / factor)
            if within and not within < factor * change < beyond:
                change = math.sqrt(within * beyond) / factor
            rescale(change)
            factor, kl = factor * change, measure()
        if not kl <= FAR * target:
            rescale(within / factor)
            factor, kl = within or factor, kl_within
            if not within:
                return factor, kl  # nothing is known of this update: the next is searched too
        self.settled = True
        return factor, kl


class LastUpdate:
    """The update that `optimizer`'s next step makes, to be scaled afterwards.

    Made before the step; needs the gradients that the step used. Nothing is copied for torch's
    plain SGD, RMSprop and AdamW, whose state tells what the step was; for any other optimizer the
    trained weights are.
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.scale = 1.0
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.old = {
            p: p.detach().clone()
            for group in optimizer.param_groups
            if not _is_known(optimizer, group)
            for p in group["params"]
            if p.grad is not None
        }

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiplies the update by `factor`: 1 leaves it, 0 takes it back."""
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            for p in group["params"]:
                if p in self.old:
                    p.copy_(self.old[p].lerp(p, factor))
                elif p.grad is not None:
                    own = getattr(self.optimizer, "rates", {}).get(p, lr)  # online.py's
                    p.sub_(self._update(group, p, own), alpha=(factor - 1) * self.scale)
        self.scale *= factor

    def _update(self, group: dict, p: Tensor, lr: float | Tensor) -> Tensor:
        """What the step subtracted from p: lr · (d + decay · p before the step)."""
        direction, decay = _direction(self.optimizer, group, p)
        if not decay:
            return lr * direction
        moved = self.scale * lr  # p = p₀ − moved · (d + decay · p₀)
        before = (p + moved * direction) / (1 - moved * decay)
        return lr * (direction + decay * before)


@torch.no_grad()
def alignment(optimizer: Optimizer) -> float | None:
    """The cosine between the gradient and the last update, of weights whose update is known.

    Of fresh samples: above 0 where the last update went uphill, 0 where it followed noise. Before a
    step; None where there was none before, or the optimizer does not tell.
    """
    from torch.distributed.tensor import DTensor  # 0.6 s, unless something has imported it already

    products, shards = [], False
    for group in optimizer.param_groups:
        if _tells(optimizer, group):
            for p in group["params"]:
                if p.grad is not None and optimizer.state.get(p):
                    d, g = _direction(optimizer, group, p)[0], p.grad
                    if isinstance(g, DTensor):
                        d, g, shards = d.to_local(), g.to_local(), True
                    d, g = d.flatten(), g.flatten()
                    products.append(torch.stack([d.dot(g), d.dot(d), g.dot(g)]))
    if not products:
        return None
    total = torch.stack(products).sum(0)
    if shards:
        torch.distributed.all_reduce(total)
    both, one, other = total.tolist()
    return both / math.sqrt(one * other) if one * other > 0 else None


def tells(optimizer: Optimizer) -> bool:
    """Whether `alignment` will be known after a step."""
    return any(_tells(optimizer, group) for group in optimizer.param_groups)


def _tells(optimizer: Optimizer, group: dict) -> bool:
    return _is_known(optimizer, group) and bool(group.get("betas") or group["momentum"] > 0)


def _is_known(optimizer: Optimizer, group: dict) -> bool:
    """Whether `_direction` tells what a step did."""
    decay = float(group["weight_decay"])
    if group.get("maximize") or group.get("nesterov") or group.get("amsgrad"):
        return False
    kind = _torch_class(optimizer)
    if kind is torch.optim.AdamW:
        return float(group["lr"]) * decay < 0.5  # beyond, dividing by 1 − lr · decay is unsafe
    if kind is torch.optim.SGD:
        return not decay or group["momentum"] > 0
    return kind is torch.optim.RMSprop and group["momentum"] > 0


def _torch_class(optimizer: Optimizer) -> type:
    """Whose step it makes: online.py's say it of themselves."""
    return getattr(optimizer, "torch_class", type(optimizer))


def _direction(optimizer: Optimizer, group: dict, p: Tensor) -> tuple[Any, float]:
    """d and the decoupled decay of the step p ← p − lr · (d + decay · p), by the state it left."""
    state = optimizer.state.get(p, {})  # [p] would make an entry
    if _torch_class(optimizer) is not torch.optim.AdamW:
        return (state["momentum_buffer"] if group["momentum"] else p.grad), 0.0
    beta1, beta2 = (float(beta) for beta in group["betas"])
    step = float(state["step"])
    size = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    direction = size.mul_(1 - beta1**step).reciprocal_().mul_(state["exp_avg"])  # in one buffer
    return direction, float(group["weight_decay"])
