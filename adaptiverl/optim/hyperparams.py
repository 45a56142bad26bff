"""The only place that reads and writes an optimizer's param_groups.

Numbers, tensors (written in place: a captured graph keeps seeing them) and pairs of betas alike.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

Group = dict[str, Any]
BETAS = {"beta1": 0, "beta2": 1}
# A rule may not go beyond these, whatever it is told; those of lr and momentum can be chosen.
BOUNDS = {
    "lr": (1e-9, 10.0),
    "momentum": (0.0, 0.999),
    "beta1": (0.0, 0.999),
    "beta2": (0.5, 0.9999),
    "alpha": (0.5, 0.9999),
    "weight_decay": (0.0, 1.0),
}


# What bitsandbytes' optimizers keep first in `betas`, by their `optimizer_name`
FIRST_OF_BETAS = {"momentum": "momentum", "lars": "momentum", "rmsprop": "alpha", "adagrad": None}


def places(optimizer: Optimizer) -> dict[str, str | None]:
    """Under which of these names each one is found in `optimizer`'s groups; None: not there."""
    own: dict[str, str | None] = {name: name for name in BOUNDS}
    if any(kind.__module__.startswith("bitsandbytes.") for kind in type(optimizer).__mro__):
        kept_as: str = optimizer.optimizer_name  # type: ignore[attr-defined]
        if kept_as in FIRST_OF_BETAS:
            own |= {"beta1": None, "beta2": None}
            if meant := FIRST_OF_BETAS[kept_as]:
                own[meant] = "beta1"
    return own


def get(group: Group, name: str | None) -> float | None:
    """The value of `name`, one of BOUNDS; None where the optimizer has no such thing.

    A momentum or weight decay of 0 is none: RMSprop makes no buffer for it.
    """
    if name is None:
        return None
    if name in BETAS:
        betas: Sequence[Any] | None = group.get("betas")
        return None if betas is None else float(betas[BETAS[name]])
    if name not in group:
        return None
    return float(group[name]) or None


def put(group: Group, name: str, value: float) -> None:
    """Writes `value`, in place where it is a tensor."""
    if name in BETAS:
        betas = list(group["betas"])
        betas[BETAS[name]] = _written(betas[BETAS[name]], value)
        group["betas"] = type(group["betas"])(betas)
    else:
        group[name] = _written(group[name], value)


def first_device(optimizer: Optimizer) -> torch.device:
    """Of its first parameter; there are groups without any."""
    tensors = (p for group in optimizer.param_groups for p in group["params"])
    return next((p.device for p in tensors), torch.device("cpu"))


def one_of_each_rate(groups: Iterable[Group]) -> list[Group]:
    """The groups without those whose rate is the very tensor of another group."""
    own = {id(g["lr"]) if isinstance(g["lr"], Tensor) else id(g): g for g in groups}
    return list(own.values())


def scaled(group: Group, ratio: float, bounds: tuple[float, float]) -> Callable[[], object]:
    """Multiplies the rate, within `bounds` (0 stays 0); what is returned puts it back.

    A tensor is not read, so the device is not waited for.
    """
    old = group["lr"]
    if not isinstance(old, Tensor):
        group["lr"] = clamp(old * ratio, bounds) if old else old
        return lambda: group.update(lr=old)
    saved = old.clone()
    old.copy_((saved * ratio).clamp(*bounds).where(saved > 0, saved))
    return partial(old.copy_, saved)


def _written(old: Any, value: float) -> Any:
    return old.fill_(value) if isinstance(old, Tensor) else value


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """Of all gradients there are, fetched from their device."""
    return float(get_total_norm([p.grad for p in parameters if p.grad is not None]))


def number(x: float | Tensor) -> float:
    """`x`, fetched from its device if it is a tensor."""
    return float(x.detach() if isinstance(x, Tensor) else x)


def clamp(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
