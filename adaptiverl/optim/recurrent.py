"""A small GRU that answers each row of features with a bounded log scale, and learns while it runs.

What the rows are is online.py's (tensors) and controller.py's (one row, the whole optimizer). Its
head starts at zero or from assets/online.safetensors (scripts/meta_train.py).
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HIDDEN = 16
REACH = math.log(2)  # of a log scale, before centring
META_LR = 3e-3  # length of a step of the weights while they learn online
HOME = 0.99  # and how much of what they learned is kept a step: they stay near where they began
ASSETS = Path(__file__).parent.parent / "assets" / "online.safetensors"

Weights = dict[str, Tensor]
Tensors = Any  # a tensor, or a dict of tensors by name


def fresh(features: int, seed: int = 0) -> Weights:
    """torch's GRUCell with a head of zeros, so that every answer is exactly 0."""
    chance = torch.Generator().manual_seed(seed)
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


def centre(values: Tensor, among: Tensor | None) -> Tensor:
    """`values` [T] less their mean; with `among` [T], 1 or 0, that of those rows, else 0."""
    if among is None:
        return values - values.mean()
    return (values - (values * among).sum() / among.sum().clamp(min=1)) * among


def answer(
    weights: Weights, x: Tensor, hidden: Tensor, centred: bool, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log scales [T] and the next hidden states [T, HIDDEN] for features `x` [T, F].

    Scales are `centred` over the rows that `among` names.

    Features that are not finite count as 0, so one bad gradient leaves no trace.
    """
    x = x.nan_to_num(0.0, 0.0, 0.0).clamp(-3, 3)
    hidden = torch.gru_cell(x, hidden, weights["x"], weights["h"], weights["b"], weights["c"])
    scale = REACH * torch.tanh(hidden @ weights["head"])
    return (centre(scale, among) if centred else scale), hidden


def learn(
    weights: Weights,
    home: Weights,
    x: Tensor,
    hidden: Tensor,
    gain: Tensor,
    centred: bool,
    rate: float = META_LR,
    kept: float = HOME,
    among: Tensor | None = None,
) -> Weights:
    """The weights after one step that raises Σ gain · log scale for the answer that `x` had.

    `gain` [T] is −∂loss/∂log scale of the next batch, in any unit: the step has the length `rate`,
    and none where nothing is to be gained; `kept` of what is not `home` stays.
    """
    with torch.enable_grad():
        own = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        scale, _ = answer(own, x, hidden, centred, among)
        grads = torch.autograd.grad((gain * scale).sum(), list(own.values()))
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    factor = torch.where(norm > 0, rate / norm, torch.zeros_like(norm)).nan_to_num(0.0, 0.0, 0.0)
    return {
        name: home[name] + kept * (weight - home[name]) + factor * grad.nan_to_num(0.0, 0.0, 0.0)
        for (name, weight), grad in zip(weights.items(), grads, strict=True)
    }


def moved(tensors: Tensors, device: torch.device) -> Tensors:
    """`tensors` on `device`."""
    if isinstance(tensors, Tensor):
        return tensors.to(device)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def check_shapes(name: str, loaded: Tensors, own: Tensors) -> None:
    """Raises ValueError where what is loaded has other names or shapes than `own`."""
    if isinstance(own, Tensor):
        if loaded.shape != own.shape:
            there, here = list(loaded.shape), list(own.shape)
            raise ValueError(f"the state does not fit: {name} is {there} there and {here} here")
    elif loaded.keys() != own.keys():
        raise ValueError(f"the state does not fit: {name} has {[*loaded]} there, {[*own]} here")
    else:
        for part in own:
            check_shapes(f"{name}.{part}", loaded[part], own[part])
