"""REINFORCE fine-tuning of language models, with optimizers that adapt as they go."""

from adaptiverl.optim.adaptive import AdaptiveOptimizer
from adaptiverl.optim.online import OnlineAdamW, OnlineRMSProp, OnlineSGD
from adaptiverl.optim.schedulers import AdaptiveScheduler, RewardAdaptiveScheduler
from adaptiverl.optim.trust_region import LastUpdate, TrustRegion, alignment

__version__ = "0.1.0"
__all__ = [
    "AdaptiveOptimizer",
    "AdaptiveScheduler",
    "LastUpdate",
    "OnlineAdamW",
    "OnlineRMSProp",
    "OnlineSGD",
    "RewardAdaptiveScheduler",
    "TrustRegion",
    "alignment",
]
