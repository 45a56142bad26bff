"""TRL's RLOOTrainer and GRPOTrainer with an optimizer of ours that sees their rewards.

tap = RewardTap(my_reward)
optimizer = AdaptiveOptimizer(AdamW(model.parameters(), lr=1e-5), reward_rule="trend")
RLOOTrainer(model, reward_funcs=tap, …, optimizers=(optimizer, None),
            callbacks=[RewardObserveCallback(optimizer, tap.last)])
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from adaptiverl.integrations.hf import RewardObserveCallback, TrustRegionCallback

__all__ = ["RewardObserveCallback", "RewardTap", "TrustRegionCallback"]


class RewardTap:
    """A reward function that remembers its last batch; async if `reward` is.

    `last()` is the mean of what it returned, `texts()` are the prompts with their completions,
    `informative(n)` says whether completions of one prompt differed in it.
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
        self.values: list[float | None] = []
        self.batch: list[tuple[Any, Any]] = []  # prompts with their completions
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)  # TRL logs by this name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._remember(self.reward(*args, **kwargs), kwargs)

    def _remember(self, values: list[float | None], batch: dict[str, Any]) -> list[float | None]:
        prompts, completions = (batch.get(name) or [] for name in ("prompts", "completions"))
        self.batch = [*zip(prompts, completions, strict=False)]
        self.values, known = [*values], _known(values)
        self.mean = sum(known) / len(known) if known else None
        return values

    def last(self, step: int = 0) -> float | None:
        """The mean of this process's last batch; None before there was one, or if all missed."""
        return self.mean

    def informative(self, group_size: int) -> bool:
        """Whether the rewards of any prompt's `group_size` completions differ in the last batch.

        False where TRL's frac_reward_zero_std is 1, of this process and this reward alone: then the
        gradient is only that of a KL penalty. Missing rewards are left out.
        """
        groups = range(0, len(self.values), group_size)
        return any(len({*_known(self.values[i : i + group_size])}) > 1 for i in groups)

    def texts(self) -> list[str]:
        """Prompts with completions of this process's last batch, for TrustRegionCallback."""
        return [_text(prompt) + _text(completion) for prompt, completion in self.batch]


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _text(part: Any) -> str:
    """Of a string, or of a conversation."""
    return part if isinstance(part, str) else "\n".join(message["content"] for message in part)


class _AsyncRewardTap(RewardTap):
    async def __call__(self, *args: Any, **kwargs: Any) -> list[float | None]:
        return self._remember(await self.reward(*args, **kwargs), kwargs)
