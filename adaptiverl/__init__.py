"""REINFORCE fine-tuning of language models, with optimizers that adapt as they go.

The names below load torch when they are first used, not before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptiverl.optim.adaptive import AdaptiveOptimizer
    from adaptiverl.optim.controller import Controller
    from adaptiverl.optim.hyperparams import mean_over_processes
    from adaptiverl.optim.mini import AdamMini
    from adaptiverl.optim.online import OnlineAdamW, OnlineRMSProp, OnlineSGD
    from adaptiverl.optim.schedulers import AdaptiveScheduler, RewardAdaptiveScheduler
    from adaptiverl.optim.trust_region import TrustRegion, UpdateInfo

__version__ = "0.2.0"
__all__ = [
    "AdamMini",
    "AdaptiveOptimizer",
    "AdaptiveScheduler",
    "Controller",
    "OnlineAdamW",
    "OnlineRMSProp",
    "OnlineSGD",
    "RewardAdaptiveScheduler",
    "TrustRegion",
    "UpdateInfo",
    "mean_over_processes",
]
_MODULES = {
    "adaptive": ("AdaptiveOptimizer",),
    "controller": ("Controller",),
    "hyperparams": ("mean_over_processes",),
    "mini": ("AdamMini",),
    "online": ("OnlineAdamW", "OnlineRMSProp", "OnlineSGD"),
    "schedulers": ("AdaptiveScheduler", "RewardAdaptiveScheduler"),
    "trust_region": ("TrustRegion", "UpdateInfo"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"adaptiverl.optim.{module}"), name)
    raise AttributeError(f"module 'adaptiverl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
