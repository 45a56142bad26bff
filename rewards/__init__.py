"""Rewards: callables with TRL's signature, `f(prompts, completions, **columns) -> list`.

They know nothing of adaptiverl: any of them works in TRL, and any TRL reward works here. Importing
this package loads no model and no torch.
"""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rewards.base import FatalJudgeError, Interrupted, Reward
from rewards.checks import check_rewards
from rewards.classifier import ClassifierReward
from rewards.function import PythonReward
from rewards.human import HumanReward
from rewards.judge import JudgeReward
from rewards.local_judge import LocalJudgeReward
from rewards.similarity import CosineReward
from rewards.text import LengthReward, RegexReward

if TYPE_CHECKING:
    from rewards.composite import CompositeReward

AnyReward = Annotated[
    RegexReward
    | LengthReward
    | CosineReward
    | ClassifierReward
    | JudgeReward
    | LocalJudgeReward
    | HumanReward
    | PythonReward,
    Field(discriminator="type"),
]
REWARD_TYPES: tuple[type[Reward], ...] = AnyReward.__origin__.__args__  # type: ignore[attr-defined]

__all__ = [
    "REWARD_TYPES",
    "AnyReward",
    "ClassifierReward",
    "CompositeReward",
    "CosineReward",
    "FatalJudgeError",
    "HumanReward",
    "Interrupted",
    "JudgeReward",
    "LengthReward",
    "LocalJudgeReward",
    "PythonReward",
    "RegexReward",
    "Reward",
    "check_rewards",
]


def __getattr__(name: str) -> Any:
    """CompositeReward imports torch, which takes seconds, so it is imported when it is used."""
    if name == "CompositeReward":
        from rewards.composite import CompositeReward

        return CompositeReward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
