"""TRL's RLOOTrainer and GRPOTrainer with an optimizer of ours that sees their rewards.

tap = RewardTap(my_reward)
optimizer = AdaptiveOptimizer(AdamW(model.parameters(), lr=1e-5), reward_rule="trend")
RLOOTrainer(model, reward_funcs=tap, …, optimizers=(optimizer, None),
            callbacks=[RewardObserveCallback(optimizer, tap.last)])
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from adaptiverl.integrations.hf import RewardObserveCallback, TrustRegionCallback

__all__ = ["RewardObserveCallback", "RewardTap", "TrustRegionCallback"]


class RewardTap:
    """A reward function that remembers its last batch; async if `reward` is.

    `last()` is the mean of what it returned, `texts()` are the prompts with their completions, and
    `informative()` says whether any completions of one prompt had different rewards.
    """

    def __new__(cls, reward: Callable[..., Any]) -> "RewardTap":
        called = reward
        while isinstance(called, partial):
            called = called.func
        waits = map(inspect.iscoroutinefunction, (called, type(called).__call__))
        return super().__new__(_AsyncRewardTap if any(waits) else cls)

    def __getnewargs__(self) -> tuple[Callable[..., Any]]:
        """For copy and pickle."""
        return (self.reward,)

    def __init__(self, reward: Callable[..., Any]):
        self.reward = reward
        self.mean: float | None = None
        self.batch: list[tuple[Any, Any]] = []  # prompts with their completions
        self.differs = True
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)  # TRL logs by this name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._remember(self.reward(*args, **kwargs), kwargs)

    def _remember(self, values: list[float | None], batch: dict[str, Any]) -> list[float | None]:
        prompts, completions = (batch.get(name) or [] for name in ("prompts", "completions"))
        self.batch = [*zip(prompts, completions, strict=False)]
        of_prompt: dict[str, set[float]] = {}
        for prompt, value in zip(prompts, values, strict=False):
            if value is not None and math.isfinite(value):
                of_prompt.setdefault(_text(prompt), set()).add(value)
        self.differs = any(len(own) > 1 for own in of_prompt.values())
        known = [value for value in values if value is not None and math.isfinite(value)]
        self.mean = sum(known) / len(known) if known else None
        return values

    def last(self, step: int = 0) -> float | None:
        """The mean of this process's last batch; None before there was one, or if all missed."""
        return self.mean

    def informative(self) -> bool:
        """Whether rewards of this process's last batch differ within a prompt."""
        return self.differs

    def texts(self) -> list[str]:
        """Prompts with completions of this process's last batch, for TrustRegionCallback."""
        return [_text(prompt) + _text(completion) for prompt, completion in self.batch]


def _text(part: Any) -> str:
    """Of a string, or of a conversation."""
    return part if isinstance(part, str) else "\n".join(message["content"] for message in part)


class _AsyncRewardTap(RewardTap):
    async def __call__(self, *args: Any, **kwargs: Any) -> list[float | None]:
        return self._remember(await self.reward(*args, **kwargs), kwargs)
