"""Recurrent optimizers: torch's own, with each tensor's update scaled by a GRU that learns."""

from adaptiverl.optim.online.optimizers import Online, OnlineAdamW, OnlineRMSProp, OnlineSGD

__all__ = ["Online", "OnlineAdamW", "OnlineRMSProp", "OnlineSGD"]
