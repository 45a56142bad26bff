"""A small GRU that answers each row of features with a bounded log scale, and learns as it runs.

The rows are made by optimizers.py (one per tensor) and learned.py (one for the optimizer). Its head
starts at zero or from assets/online.safetensors (scripts/meta_train.py).
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HIDDEN = 16
MAX_LOG_SCALE = math.log(2)  # of a log scale, before centring
META_LR = 3e-3  # length of a step of the weights while they learn online
ANCHOR_DECAY = 0.99  # of the distance to their anchor, per step: they stay near where they started
ASSETS = Path(__file__).parents[2] / "assets" / "online.safetensors"

Weights = dict[str, Tensor]
Tensors = Any  # a tensor, or a dict of tensors by name


def fresh(features: int) -> Weights:
    """torch's GRUCell with a head of zeros, so that every answer is exactly 0."""
    chance = torch.Generator().manual_seed(0)
    bound = 1 / math.sqrt(HIDDEN)
    shapes = {"x": (3 * HIDDEN, features), "h": (3 * HIDDEN, HIDDEN), "b": (3 * HIDDEN,)}
    weights = {
        name: torch.empty(shape).uniform_(-bound, bound, generator=chance)
        for name, shape in shapes.items()
    }
    return weights | {"c": torch.zeros(3 * HIDDEN), "head": torch.zeros(HIDDEN)}


def trained(name: str) -> Weights:
    """The weights that were trained beforehand: "tensors" or "rate"."""
    from safetensors.torch import load_file

    prefix = f"{name}."
    found = load_file(ASSETS)
    return {k.removeprefix(prefix): w for k, w in found.items() if k.startswith(prefix)}


def centre(values: Tensor, among: Tensor) -> Tensor:
    """`values` [T] less their mean, over the rows where `among` [T] is 1; 0 in the others."""
    return (values - (values * among).sum() / among.sum().clamp(min=1)) * among


def answer(
    weights: Weights, x: Tensor, hidden: Tensor, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log scales [T] and the next hidden states [T, HIDDEN] for features `x` [T, F].

    Where `among` is given, scales are centred over the rows that it names. Features that are not
    finite count as 0, so one bad gradient leaves no trace.
    """
    x = x.nan_to_num(0.0, 0.0, 0.0).clamp(-3, 3)
    hidden = torch.gru_cell(x, hidden, weights["x"], weights["h"], weights["b"], weights["c"])
    scale = MAX_LOG_SCALE * torch.tanh(hidden @ weights["head"])
    return scale if among is None else centre(scale, among), hidden


def learn(
    weights: Weights,
    anchor: Weights,
    x: Tensor,
    hidden: Tensor,
    gain: Tensor,
    among: Tensor | None = None,
    rate: float = META_LR,
    anchor_decay: float = ANCHOR_DECAY,
) -> Weights:
    """The weights after one step that raises Σ gain · log scale for the answer that `x` had.

    `gain` [T] is −∂loss/∂log scale of the next batch, in any unit: the step has the length `rate`,
    and 0 where nothing is to be gained; `anchor_decay` of the distance to `anchor` stays.
    """
    with torch.enable_grad():
        own = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        scale, _ = answer(own, x, hidden, among)
        grads = torch.autograd.grad((gain * scale).sum(), list(own.values()))
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    factor = torch.where(norm > 0, rate / norm, torch.zeros_like(norm)).nan_to_num(0.0, 0.0, 0.0)
    return {
        name: anchor[name]
        + anchor_decay * (weight - anchor[name])
        + factor * grad.nan_to_num(0.0, 0.0, 0.0)
        for (name, weight), grad in zip(weights.items(), grads, strict=True)
    }


def fitted(name: str, loaded: Tensors, own: Tensors) -> Tensors:
    """`loaded` on the device of `own`. Raises ValueError if it has other names or shapes."""
    if isinstance(own, Tensor):
        if loaded.shape != own.shape:
            there, here = list(loaded.shape), list(own.shape)
            raise ValueError(f"the state does not fit: {name} is {there} there and {here} here")
        return loaded.to(own.device)
    if loaded.keys() != own.keys():
        raise ValueError(f"the state does not fit: {name} has {[*loaded]} there, {[*own]} here")
    return {part: fitted(f"{name}.{part}", loaded[part], own[part]) for part in own}
