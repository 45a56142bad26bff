"""Rewards: callables with TRL's signature, `f(prompts, completions, **columns) -> list`.

They know nothing of adaptiverl: any of them works in TRL, and any TRL reward works here.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable

from rewards.composite import CompositeReward

__all__ = ["CompositeReward", "check_signature", "make_reward"]


def make_reward(kind: str, **arguments) -> Callable:
    """The reward that a config's TYPE names; raises ValueError for arguments that cannot work."""
    match kind:
        case "regex":
            from rewards.text import RegexReward

            return RegexReward(**arguments)
        case "length":
            from rewards.text import LengthReward

            return LengthReward(**arguments)
        case "cosine":
            from rewards.similarity import CosineReward

            return CosineReward(**arguments)
        case "classifier":
            from rewards.classifier import ClassifierReward

            return ClassifierReward(**arguments)
        case "judge":
            from rewards.judge import JudgeReward

            return JudgeReward(**arguments)
        case "human":
            from rewards.human import HumanReward

            return HumanReward(**arguments)
        case "local_judge":
            from rewards.local_judge import LocalJudgeReward

            return LocalJudgeReward(**arguments)
        case "python":
            return python_reward(**arguments)
    raise ValueError(f"no reward is called {kind!r}")


def python_reward(function: str) -> Callable:
    """The reward function that "my_module:my_reward" names."""
    module, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    if not callable(found):
        raise ValueError(f"module {module} has no function {name}")
    return found


def check_signature(reward: Callable, columns: Iterable[str]) -> None:
    """Raises ValueError if `reward` cannot be called as rewards are, with `columns` by name."""
    given = {"prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"}
    try:
        inspect.signature(reward).bind(**dict.fromkeys(given.union(columns)))
    except TypeError as error:
        raise ValueError(
            f"it cannot be called as rewards are, by name: {error}. Let it take what it needs "
            "(prompts, completions, columns of the prompts) and **columns"
        ) from error
