"""The optimizers behind the config's OPTIM: torch's, the online ones, and bitsandbytes' AdamW."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from adaptiverl.optim.online import OnlineAdamW, OnlineRMSProp, OnlineSGD

SGD = {"sgd": torch.optim.SGD, "online_sgd": OnlineSGD}
RMSPROP = {"rmsprop": torch.optim.RMSprop, "online_rmsprop": OnlineRMSProp}
ADAMW = {"adamw": torch.optim.AdamW, "online_adamw": OnlineAdamW}
ONLINE = (OnlineSGD, OnlineRMSProp, OnlineAdamW)


def make_optimizer(
    name: str,
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> Optimizer:
    """SGD, RMSprop or AdamW of named parameters; `momentum` is AdamW's beta1."""
    named: list[Any] = list(parameters)
    if not name.startswith("online_"):
        named = [p for _, p in named]
    common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if name in SGD:
        return SGD[name](named, momentum=momentum, **common)
    if name in RMSPROP:
        return RMSPROP[name](named, momentum=momentum, **common)
    if name in ADAMW:  # fused: one pass over the weights, a quarter of the time, no temporaries
        return ADAMW[name](named, betas=(momentum, 0.999), fused=True, **common)
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # seconds to import

        return AdamW8bit(named, betas=(momentum, 0.999), **common)
    raise ValueError(f"no optimizer is called {name!r}")
