"""The only place that reads and writes an optimizer's param_groups.

Numbers, tensors (written in place: a captured graph keeps seeing them) and pairs of betas alike.
"""

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from adaptiverl.optim.constants import BOUNDS

Group = dict[str, Any]
Scalar = float | Tensor | None  # a signal; None where there is none
BETAS = {"beta1": 0, "beta2": 1}
# What bitsandbytes' optimizers keep first in `betas`, by their `optimizer_name`
FIRST_OF_BETAS = {"momentum": "momentum", "lars": "momentum", "rmsprop": "alpha", "adagrad": None}


class Hyperparameters:
    """Stands for a torch optimizer where another library has the numbers.

    They are one group, under the names that torch gives them.
    """

    def __init__(self, **group: Any):
        self.param_groups = [group]


def places(optimizer: Optimizer | Hyperparameters) -> dict[str, str | None]:
    """Under which of these names each one is found in `optimizer`'s groups; None: not there."""
    own: dict[str, str | None] = {name: name for name in BOUNDS}
    if any(kind.__module__.startswith("bitsandbytes.") for kind in type(optimizer).__mro__):
        kept_as: str = optimizer.optimizer_name  # type: ignore[union-attr]
        if kept_as in FIRST_OF_BETAS:
            own |= {"beta1": None, "beta2": None}
            if meant := FIRST_OF_BETAS[kept_as]:
                own[meant] = "beta1"
    return own


def get(group: Group, name: str | None) -> float | None:
    """The value of `name`, one of BOUNDS; None where the optimizer has no such thing.

    A momentum or weight decay of 0 is none: RMSprop makes no buffer for it.
    """
    if name in BETAS:
        return float(group["betas"][BETAS[name]]) if "betas" in group else None
    return float(group[name]) or None if name in group else None


def put(group: Group, name: str, value: float) -> None:
    """Writes `value`, in place where it is a tensor."""
    if name in BETAS:
        betas = list(group["betas"])
        betas[BETAS[name]] = _written(betas[BETAS[name]], value)
        group["betas"] = type(group["betas"])(betas)
    else:
        group[name] = _written(group[name], value)


def mean_over_processes(
    signals: dict[str, float | None], device: torch.device | str = "cpu"
) -> dict[str, float]:
    """The mean of each signal over the processes that have it: not None, and finite.

    Every process must call it, with the same names in the same order; a name that no process has is
    left out. `device` is one that the process group can reduce on. Without torch.distributed, or
    with one process, these are the signals themselves.
    """
    own = {k: float(v) for k, v in signals.items() if v is not None and math.isfinite(v)}
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return own
    table = [[own.get(name, 0.0) for name in signals], [float(name in own) for name in signals]]
    total = torch.tensor(table, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    columns = zip(signals, *total.tolist(), strict=True)
    return {name: value / count for name, value, count in columns if count}


@contextmanager
def scaled_rates(
    optimizer: Optimizer | Hyperparameters, ratio: float, bounds: tuple[float, float]
) -> Iterator[None]:
    """Within the context every rate is times `ratio`, inside `bounds`; a rate of 0 stays 0.

    Groups that share one tensor as their rate are scaled once. No tensor is read, so there is no
    synchronisation with the device.
    """
    groups = optimizer.param_groups
    own = {id(g["lr"]) if isinstance(g["lr"], Tensor) else id(g): g for g in groups}
    saved = [(g, g["lr"].clone() if isinstance(g["lr"], Tensor) else g["lr"]) for g in own.values()]
    for group, old in saved:
        if isinstance(old, Tensor):
            group["lr"].copy_((old * ratio).clamp(*bounds).where(old > 0, old))
        elif old:
            group["lr"] = clamp(old * ratio, bounds)
    try:
        yield
    finally:
        for group, old in saved:
            group["lr"] = group["lr"].copy_(old) if isinstance(old, Tensor) else old


def _written(old: Any, value: float) -> Any:
    return old.fill_(value) if isinstance(old, Tensor) else value


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """Of all gradients there are, fetched from their device."""
    own = [p.grad for p in parameters if p.grad is not None]
    # A row that came twice is summed before its square is
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in own]
    return float(get_total_norm(dense))


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step evaluates the loss anew, as that of LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def numbers(**signals: Scalar) -> dict[str, float]:
    """The signals that there are, fetched from their devices.

    Raises TypeError, which names it, for what is no number.
    """
    result = {}
    for name, x in signals.items():
        if x is None:
            continue
        try:
            if isinstance(x, str | bytes):  # of which float makes numbers
                raise TypeError
            result[name] = float(x.detach() if isinstance(x, Tensor) else x)
        except (TypeError, ValueError, RuntimeError) as error:  # the last are torch's
            raise TypeError(f"{name} is {x!r:.60}; it must be one number") from error
    return result


def check_optimizer(optimizer: Any, name: str) -> None:
    """Raises TypeError for what is no optimizer, such as parameters; `name` is the argument."""
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"{name} is a {type(optimizer).__name__}; it must be an optimizer, such as "
            "AdamW(model.parameters(), lr=1e-4)"
        )


def check_rate(rate: float, bounds: tuple[float, float]) -> None:
    """Raises ValueError for a rate outside of its bounds; 0, which no rule moves, is none."""
    if rate and not bounds[0] <= rate <= bounds[1]:
        raise ValueError(f"the rate {rate:g} is outside its bounds, {bounds[0]:g} … {bounds[1]:g}")


def clamp(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])
