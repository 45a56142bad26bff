"""The optimizers behind the config's OPTIM: torch's own, and bitsandbytes' 8-bit AdamW."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer


def make_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> Optimizer:
    """SGD, RMSprop or AdamW; `momentum` is AdamW's beta1."""
    parameters = list(parameters)
    match name:
        case "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
        case "rmsprop":
            return torch.optim.RMSprop(
                parameters, lr=lr, momentum=momentum, weight_decay=weight_decay
            )
        case "adamw":
            return torch.optim.AdamW(
                parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay
            )
        case "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit  # seconds to import

            return AdamW8bit(parameters, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)
    raise ValueError(f"no optimizer is called {name!r}")


def momentum_of(group: dict[str, Any]) -> float:
    """The momentum of a parameter group, whichever key its optimizer keeps it under."""
    return float(group["betas"][0] if "betas" in group else group["momentum"])
