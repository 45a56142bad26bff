"""The last update of an optimizer: its direction, how it agrees with the gradient, its scaling.

KL ≈ ½ lr² uᵀFu for a small update u, so that scaling u by s scales the KL by s².
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptiverl.optim.hyperparams import Group
from adaptiverl.optim.mini import AdamMini, denominators

LARGEST_LR = 10.0  # up to which AdamW's updates are small enough to be taken off again
SAFE_DECAY = 0.5  # of lr · weight decay, up to which it is safe to divide by 1 less that


class PerTensorOptimizer:
    """Base of an optimizer that makes the step of `torch_class` with a rate for each tensor."""

    torch_class: type[Optimizer]
    rates: dict[Tensor, Tensor]  # of each tensor, in the last step


def copyable(optimizer: Optimizer) -> dict[str, Any]:
    """What copies of `optimizer` keep: neither its hooks nor the step that a scheduler wrapped."""
    own = vars(optimizer).items()
    return {k: v for k, v in own if k != "step" and not k.endswith("_hooks")}


class LastUpdate:
    """The update that `optimizer`'s next step makes, so that it can be scaled afterwards.

    Create it before the step, which must use the gradients that are there; they may be cleared
    afterwards. Nothing is copied for torch's AdamW and AdamMini, because their state determines
    the update. The trained weights are copied for any other optimizer, and where they have fewer
    than 32 bits: the difference of two rounded weights is not the update. A gradient of SGD may be
    so large that the weights before the step are lost to rounding.
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.scale = 1.0
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.moved = [  # of each group
            [p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups
        ]
        self.old: dict[Tensor, Tensor] = {}
        for group, moved in zip(optimizer.param_groups, self.moved, strict=True):
            recoverable = _is_recoverable(optimizer, group)
            self.old |= {p: p.detach().clone() for p in moved if _is_short(p) or not recoverable}
        self.new: dict[Tensor, Tensor] = {}  # as the step left them, of 16 bits

    @torch.no_grad()
    def is_lost(self) -> bool:
        """Whether rounding has left nothing of it, in weights that were copied."""
        if not self.old:
            return False
        moved = [_local(p)[0].ne(_local(old)[0]).any() for p, old in self.old.items()]
        return not _any(moved, any(_local(p)[1] for p in self.old))

    @property
    def max_scale(self) -> float:
        """The largest factor, from which the update can be made smaller again."""
        largest = math.inf
        for group, lr, moved in zip(
            self.optimizer.param_groups, self.rates, self.moved, strict=True
        ):
            if lr and any(p not in self.old for p in moved):
                decay = float(group["weight_decay"])
                rate = min(LARGEST_LR, SAFE_DECAY / decay if decay else math.inf)
                largest = min(largest, rate / lr)
        return largest

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiplies the update by `factor`: 1 leaves it, 0 takes it back."""
        own = self.optimizer.rates if isinstance(self.optimizer, PerTensorOptimizer) else {}
        groups = self.optimizer.param_groups
        for group, lr, moved in zip(groups, self.rates, self.moved, strict=True):
            for p in [p for p in moved if p in self.old]:
                old = self.old[p]
                new, by = p, factor
                if _is_short(p):  # what it was scaled to before is rounded
                    new, by = self.new.setdefault(p, p.clone()), self.scale * factor
                # A lerp by 0 would make NaN of an update that is not finite
                p.copy_(old.lerp(new, by) if factor else old)
            known = [p for p in moved if p not in self.old]
            directions = _directions(self.optimizer, group, known)
            for p, (vector, divisor) in zip(known, directions, strict=True):
                update = self._update(group, p, vector / divisor, own.get(p, lr))
                p.sub_(update, alpha=(factor - 1) * self.scale)
        self.scale *= factor

    def _update(self, group: Group, p: Tensor, direction: Tensor, lr: float | Tensor) -> Tensor:
        """What the step subtracted from p: lr · (d + decay · p before the step)."""
        decay = float(group["weight_decay"])
        if not decay:
            return lr * direction
        moved = self.scale * lr  # p = p₀ − moved · (d + decay · p₀)
        before = (p + moved * direction) / (1 - moved * decay)
        return lr * (direction + decay * before)


def alignment(optimizer: Optimizer) -> float | None:
    """The cosine between the gradient and the last update, over weights whose update is known.

    Call it before a step, with the gradient of fresh samples. Above 0 the last update went uphill;
    around 0 it followed noise. None before the first step and for optimizers without such a state.
    """
    return alignment_and_finite(optimizer)[0]


@torch.no_grad()
def alignment_and_finite(optimizer: Optimizer) -> tuple[float | None, bool]:
    """`alignment`, and whether the sum of all squared gradients is finite, in one transfer."""
    products, divisors, others, shards = [], [], [], False
    for group in optimizer.param_groups:
        moved = [p for p in group["params"] if p.grad is not None]
        keeps = _keeps_direction(optimizer, group)
        known = dict.fromkeys(p for p in moved if keeps and optimizer.state.get(p))
        directions = _directions(optimizer, group, [*known])
        for p in moved:
            grad, is_shard = _local(p.grad)
            shards |= is_shard
            g = _in_32_bits(grad.flatten())
            if p in known:
                vector, divisor = next(directions)
                d = _in_32_bits(_local(vector)[0].flatten())
                products += [d.dot(g), d.dot(d), g.dot(g)]
                divisors.append(divisor)
            else:
                others.append(g.dot(g))
    totals = []
    if products:  # divided at once: a GPU takes as long for one number as for all
        both, one, squares = _stacked(products).view(-1, 3).unbind(1)
        by = _stacked(divisors)
        totals.append(torch.stack([both / by, one / by / by, squares]).sum(1))
    if others:
        totals.append(_stacked(others).sum(0, keepdim=True))
    if not totals:
        return None, True
    total = torch.cat([part.to(totals[0].device) for part in totals])
    if shards:
        torch.distributed.all_reduce(total)
    values = total.tolist()
    dot, square, known_squares = values[:3] if products else (0.0, 0.0, 0.0)
    finite = math.isfinite(sum(values[2:] if products else values))
    product = square * known_squares
    return dot / math.sqrt(product) if product > 0 else None, finite


def _stacked(numbers: list[Tensor]) -> Tensor:
    """On one device: a model may be on several."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


@torch.no_grad()
def has_gradient(optimizer: Optimizer) -> bool:
    """Whether any gradient is not 0."""
    own = [p.grad for group in optimizer.param_groups for p in group["params"]]
    local = [_local(grad) for grad in own if grad is not None]
    return bool(local) and _any([grad.any() for grad, _ in local], any(s for _, s in local))


def _any(found: list[Tensor], shards: bool) -> bool:
    """Whether any of them is true, in any process if these have shards of the same."""
    one = _stacked(found).any().float()
    if shards:
        torch.distributed.all_reduce(one)
    return bool(one)


def supports_alignment(optimizer: Optimizer) -> bool:
    """Whether `alignment` will be known after a step."""
    return any(_keeps_direction(optimizer, group) for group in optimizer.param_groups)


def _local(x: Tensor) -> tuple[Tensor, bool]:
    """This process's part of a tensor, not sparse, and whether others have the rest of it."""
    from torch.distributed.tensor import DTensor  # 0.6 s, unless something has imported it already

    if isinstance(x, DTensor):
        return x.to_local(), True
    return (x.to_dense() if x.is_sparse else x), False


def _is_short(x: Tensor) -> bool:
    """Whether its numbers have fewer than 32 bits."""
    return torch.finfo(x.dtype).bits < 32


def _in_32_bits(x: Tensor) -> Tensor:
    """Real numbers of at least 32 bits: squares of fp16 overflow."""
    x = torch.view_as_real(x).flatten() if x.is_complex() else x
    return x.float() if _is_short(x) else x


def _is_recoverable(optimizer: Optimizer, group: Group) -> bool:
    """Whether its update can be taken off the weights again, which then are as before the step."""
    is_bounded = _torch_class(optimizer) in (torch.optim.AdamW, AdamMini)
    return is_bounded and float(group["lr"]) <= LARGEST_LR and _keeps_direction(optimizer, group)


def _keeps_direction(optimizer: Optimizer, group: Group) -> bool:
    """Whether `_direction` gives what a step did. It has not been written for complex weights."""
    if any(p.is_complex() for p in group["params"]):
        return False
    decay = float(group["weight_decay"]) if "weight_decay" in group else 0.0
    if group.get("maximize") or group.get("nesterov") or group.get("amsgrad"):
        return False
    kind = _torch_class(optimizer)
    if kind in (torch.optim.AdamW, AdamMini):
        return float(group["lr"]) * decay < SAFE_DECAY
    return kind in (torch.optim.SGD, torch.optim.RMSprop) and group["momentum"] > 0


def _torch_class(optimizer: Optimizer) -> type:
    return optimizer.torch_class if isinstance(optimizer, PerTensorOptimizer) else type(optimizer)


def _directions(
    optimizer: Optimizer, group: Group, params: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """v and the number n of each tensor's step p ← p − lr · (v / n + decay · p), one by one.

    By the state that the step left. What one number divides is not copied.
    """
    states = [optimizer.state[p] for p in params]
    kind = _torch_class(optimizer)
    if kind is AdamMini and params:
        sizes, corrections = denominators(group, states)
        divisors = torch._foreach_mul([*sizes], corrections)
        yield from zip([state["exp_avg"] for state in states], divisors, strict=True)
        return
    for p, state in zip(params, states, strict=True):
        one = torch.ones((), device=p.device)
        if kind is not torch.optim.AdamW:
            yield state["momentum_buffer"], one
            continue
        beta1, beta2 = (float(beta) for beta in group["betas"])
        step = state["step"]
        size = state["exp_avg_sq"].sqrt().div_(_correction(beta2, step).sqrt()).add_(group["eps"])
        size.mul_(_correction(beta1, step))
        yield size.reciprocal_().mul_(state["exp_avg"]), one  # in one buffer


def _correction(beta: float, step: Tensor) -> Tensor:
    """1 − βᵗ, where `step` is: if fused, on the device, for which fetching would wait."""
    step = step if step.device.type == "mps" else step.double()  # which Apple's has not
    return -torch.expm1(step * (math.log(beta) if beta else -math.inf))
