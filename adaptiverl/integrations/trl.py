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

from adaptiverl.integrations.hf import Part, RewardObserveCallback, TrustRegionCallback

__all__ = ["RewardObserveCallback", "RewardTap", "TrustRegionCallback"]


class RewardTap:
    """A reward function that remembers its last batch of the training; async if `reward` is.

    `last()` is the mean of what it returned, `texts()` are its prompts and completions, and
    `informative()` says whether any completions of one prompt had different rewards.

    Batches of an evaluation are scored and not remembered: TRL's trainers may use a batch for
    several steps, with evaluations between them.
    """

    def __new__(cls, reward: Callable[..., Any]) -> "RewardTap":
        if not callable(reward):
            raise TypeError(f"reward is {reward!r:.60}; it must be a reward function, as TRL's")
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
        self.batch: list[tuple[Any, Any]] = []  # prompts with their completions, or these' ids
        self.render: Callable[..., Any] = _text  # of a prompt
        self.differs = True
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)  # TRL logs by this name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._remember(self.reward(*args, **kwargs), self._by_name(args, kwargs))

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positional arguments as `reward` calls them, or in TRL's order."""
        if not args:
            return kwargs
        own = [*inspect.signature(self.reward).parameters]
        names = own if {"prompts", "completions"} & set(own) else ["prompts", "completions"]
        return dict(zip(names, args, strict=False)) | kwargs

    def _remember(self, values: list[float | None], batch: dict[str, Any]) -> list[float | None]:
        if _is_evaluation(batch):
            return values
        # Tensors are numbers, too: each would be a number of its own in a set
        numbers = [math.nan if value is None else float(value) for value in values]
        prompts, completions = (batch.get(name) or [] for name in ("prompts", "completions"))
        ids = batch.get("completion_ids")
        sampled = [*map(_text, completions)] if ids is None else ids
        self.batch, self.render = [*zip(prompts, sampled, strict=False)], _renderer(batch)
        of_prompt: dict[str, set[float]] = {}
        for prompt, value in zip(prompts, numbers, strict=False):
            if math.isfinite(value):
                of_prompt.setdefault(_text(prompt), set()).add(value)
        self.differs = any(len(own) > 1 for own in of_prompt.values())
        known = [*filter(math.isfinite, numbers)]
        self.mean = sum(known) / len(known) if known else None
        return values

    def last(self, step: int = 0) -> float | None:
        """The mean of this process's last batch; None before there was one, or if all missed."""
        return self.mean

    def informative(self) -> bool:
        """Whether rewards of this process's last batch differ within a prompt."""
        return self.differs

    def texts(self) -> list[tuple[Part, Part]]:
        """Prompts and completions of this process's last batch, for TrustRegionCallback.

        Of a batch of a trainer, completions are the token ids that were sampled, and so are the
        prompts that are conversations, in the chat template.
        """
        return [(self.render(prompt), completion) for prompt, completion in self.batch]


def _trainer(batch: dict[str, Any]) -> Any:
    """The trainer of TRL that asks for rewards; None where none does.

    Nothing that TRL gives a reward names it, but `log_metric` is a method of it.
    """
    log_metric = batch.get("log_metric")
    if not inspect.ismethod(log_metric):
        return None
    from transformers import Trainer  # whoever has one has imported it already

    return log_metric.__self__ if isinstance(log_metric.__self__, Trainer) else None


def _is_evaluation(batch: dict[str, Any]) -> bool:
    """Whether it is one of an evaluation: TRL goes by whether the model is in training mode."""
    trainer = _trainer(batch)
    return trainer is not None and not trainer.model.training


def _renderer(batch: dict[str, Any]) -> Callable[..., Any]:
    """What makes of a prompt what the policy was given: of a conversation as TRL does it."""
    trainer = _trainer(batch)
    if trainer is None:
        return _text
    return partial(
        _rendered,
        trainer.processing_class.apply_chat_template,
        tools=getattr(trainer, "tools", None) or None,  # RLOOTrainer has none of these two
        chat_template=getattr(trainer, "chat_template", None),
        **getattr(trainer, "chat_template_kwargs", {}),
    )


def _rendered(template: Callable[..., Any], prompt: Any, **arguments: Any) -> Part:
    if isinstance(prompt, str):
        return prompt
    told = [message | {"content": _without_images(message.get("content"))} for message in prompt]
    return template(told, add_generation_prompt=True, tokenize=True, return_dict=True, **arguments)[
        "input_ids"
    ]


def _without_images(content: Any) -> Any:
    """The KL is measured on texts alone."""
    return [part for part in content if "text" in part] if isinstance(content, list) else content


def _text(part: Any) -> str:
    """Of a string, or of a conversation."""
    return part if isinstance(part, str) else "\n".join(map(_content, part))


def _content(message: dict[str, Any]) -> str:
    """Of a message whose content is a string, a list of parts, or None: only tools are called."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


class _AsyncRewardTap(RewardTap):
    async def __call__(self, *args: Any, **kwargs: Any) -> list[float | None]:
        return self._remember(await self.reward(*args, **kwargs), self._by_name(args, kwargs))
