"""What every reward is: a declaration of its keys that can be called as TRL calls rewards.

The class of a reward is its config schema, its constructor and its part of `adaptiverl keys`.
"""

import importlib.util
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

Column = list[float | None]  # what a reward gives: a score for each completion, None is missing
Weight = float | list[tuple[int, float]]
Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a file, or a folder or hub id


def _type_is_required(schema: dict[str, Any]) -> None:
    """For editors: a config must name the TYPE, a constructor need not."""
    if "TYPE" in schema["properties"]:
        schema["required"] = ["TYPE", *schema.get("required", [])]


# Keys are upper case in configs and lower case in Python.
KEYS = ConfigDict(
    extra="forbid",
    frozen=True,
    allow_inf_nan=False,
    alias_generator=str.upper,
    validate_by_alias=True,
    validate_by_name=True,
    serialize_by_alias=True,
    json_schema_extra=_type_is_required,
)


def is_no_number(value: Any, annotation: Any) -> bool:
    """Whether it is, or holds, true or false where a key takes numbers.

    Pydantic would read 1 or 0, and a config that says `SEED: true` means something else.
    """
    kinds = _kinds(annotation)
    return _holds_truth_value(value) and bool(kinds & {int, float}) and not kinds & {bool, Any}


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation names, at any depth."""
    return {annotation}.union(*map(_kinds, get_args(annotation)))


def _holds_truth_value(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_truth_value, value))
    return isinstance(value, bool)


class Interrupted(Exception):
    """The run is to stop while a reward waits; what it has received is kept."""


class FatalJudgeError(ValueError):
    """The endpoint will not answer however often it is asked: a wrong key, model or address."""


class Reward(BaseModel):
    """Base of all rewards. A subclass declares its keys as fields and defines `__call__`.

    `type` is a Literal with a default. `__call__(prompts, completions, **columns)` returns one
    float, or None, for each completion; it may be a coroutine function. It begins with
    `self.start()`, which calls `_load` once. Whatever changes while a reward is used is made in
    `_load`, so that a copy of a declaration shares nothing with it.
    """

    model_config = KEYS

    # Its field `model` names a model that this process loads: a hub id or a folder
    loads_model: ClassVar[bool] = False
    # Works in a run of one process only
    one_process: ClassVar[bool] = False
    # Asks people, or a service that may cost money
    external: ClassVar[bool] = False
    # What it reports as NAME/… that adds up over batches; of anything else the mean is of use
    counts: ClassVar[frozenset[str]] = frozenset()
    # Keys that are of use only where a policy is trained on the reward
    training_keys: ClassVar[frozenset[str]] = frozenset({"WEIGHT", "NORMALIZE", "CLIP"})
    # Keys that a run may change when it is resumed, because they do not change what is rewarded
    free_keys: ClassVar[frozenset[str]] = frozenset()

    type: str
    name: Annotated[str, BeforeValidator(lambda value: value or "")] = Field(
        "", description="Name in the logs; TYPE if absent"
    )
    weight: Weight = Field(
        1.0, description="Factor in the sum, or points [[step, weight], …] with lines between"
    )
    normalize: Literal["none", "zscore", "rank"] = Field(
        "none",
        description="zscore: by mean and deviation of the scores so far, of which older ones count "
        "less; rank: by rank in the batch, −1 to 1",
    )
    clip: tuple[float, float] | None = Field(None, description="Limits, after NORMALIZE")
    _started: bool = False

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, given: Any) -> Any:
        for name, field in cls.model_fields.items():
            for key in {name, name.upper()} & set(given if isinstance(given, dict) else ()):
                if is_no_number(given[key], field.annotation):
                    raise ValueError(f"{key} is {str(given[key]).lower()}: it must be a number")
        return given

    @model_validator(mode="after")
    def _possible(self) -> "Reward":
        if self.clip and not self.clip[0] < self.clip[1]:
            raise ValueError(f"the first of CLIP, {self.clip[0]:g}, is not below its second")
        if isinstance(self.weight, list):
            steps = [step for step, _ in self.weight]
            if not steps or sorted(set(steps)) != steps:
                raise ValueError("the points of WEIGHT, [[step, weight], …], need steps that rise")
        object.__setattr__(self, "name", self.name or self._default_name())
        return self

    def _default_name(self) -> str:
        return self.type

    def _load(self, device: Any) -> None:
        """What `start` does the first time."""

    def start(self, device: Any = None) -> None:
        """Loads what the reward needs, once; models on `device`, the CPU if None.

        Raises ValueError, OSError, ImportError or sqlite3.Error for what cannot work. A reward that
        is called before is started by the call.
        """
        if not self._started:
            self._load(device)
            self._started = True

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")

    def interrupt(self) -> None:
        """Ends all waiting: who waits gets Interrupted. May be called from a signal handler."""

    def close(self) -> None:
        """Gives back what `start` took: a terminal, a port."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, in plain numbers and texts; most keep nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""

    def changed(self) -> set[str]:
        """The keys, in upper case, that were given another value than their default."""
        fields = type(self).model_fields
        return {
            name.upper()
            for name in self.model_fields_set
            if getattr(self, name) != fields[name].default
        }

    def why_pause(self, missing: float) -> str | None:
        """Why a run should pause where this share of the scores is missing; None: it goes on."""
        return None

    @property
    def is_async(self) -> bool:
        """Whether calling the reward gives a coroutine."""
        return inspect.iscoroutinefunction(type(self).__call__)

    @property
    def after_others(self) -> bool:
        """Whether it is called last, with the others' scores by name as the column `scores`."""
        return False

    @property
    def compares(self) -> bool:
        """Whether completions of one prompt are compared, so that a single one has no score."""
        return False

    @property
    def uses_terminal(self) -> bool:
        """Whether the reward reads keys from the controlling terminal."""
        return False

    def check_columns(self, columns: Mapping[str, Iterable], source: str) -> None:
        """Raises ValueError where prompts with these columns, from `source`, cannot be scored.

        `columns` are the values of each by its name, without the prompts themselves.
        """


def require(extra: str, *modules: str) -> None:
    """Raises ValueError where one of `modules`, which `extra` installs, is not there."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"not installed (the extra {extra!r}): pip install {' '.join(missing)}")
