"""Scores: what rewards return, as one float64 tensor [B, R] with NaN for what is missing.

B completions, R rewards: `rewards_per_func` in TRL. Rewards themselves return lists with None.
"""

import logging
from collections.abc import Mapping, Sequence, Set, Sized
from typing import Any

import torch
from torch import Tensor

from rewards.base import Column
from rewards.messages import Texts, text_of

log = logging.getLogger(__name__)
LARGEST = 1e16  # training computes in float32, which holds no sum of squares of larger ones


def checked(name: str, answer: Any, completions: Texts, told: bool = False) -> tuple[Column, int]:
    """The scores that the reward `name` answered, and how many cannot be used: now None.

    These are logged in one line, unless `told`. Raises ValueError for what is not one score per
    completion.
    """
    if not isinstance(answer, Sized) or isinstance(answer, Mapping | Set | str | bytes | bytearray):
        raise ValueError(
            f"reward {name!r} returned {_short(answer)}, not a list of one score per completion"
        )
    values: list[Any] = list(answer)  # type: ignore[call-overload]
    if len(values) != len(completions):
        raise ValueError(
            f"reward {name!r} returned {len(values)} scores for {len(completions)} completions"
        )
    given: Column = []
    for i, value in enumerate(values):
        try:
            given.append(None if value is None else _number(value))
        except (TypeError, ValueError, RuntimeError) as error:  # the last is torch's
            raise ValueError(
                f"reward {name!r} returned {_short(value)} for completion {i}; one number is "
                "expected"
            ) from error
    odd = [i for i, score in enumerate(given) if score is not None and not abs(score) <= LARGEST]
    scores = [None if i in odd else score for i, score in enumerate(given)]
    if odd and not told:
        first = odd[0]
        log.warning(
            f"reward {name!r} is not finite, or beyond {LARGEST:g}, for {len(odd)} of "
            f"{len(scores)} completions and is left out there; the first: {given[first]} for "
            f"{text_of(completions[first])[:80]!r}. From here on such scores are only counted"
        )
    return scores, len(odd)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:59] + "…"


def _number(value: Any) -> float:
    """As a float; infinite where it is an integer that no float can hold."""
    if isinstance(value, str | bytes | bytearray | memoryview):  # float would read the digits in it
        raise TypeError("a text is no score")
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except OverflowError:
        return torch.inf if value > 0 else -torch.inf


def as_tensor(columns: Sequence[Sequence[float | None]], count: int) -> Tensor:
    """[B, R] from R columns of B = `count` scores, None for what is missing; R may be 0."""
    rows = [[torch.nan if x is None else x for x in column] for column in columns]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), count).T.contiguous()


def as_list(column: Tensor) -> Column:
    """One column or sum [B], with None for what is missing."""
    return [None if x != x else x for x in column.tolist()]


def mean(column: Tensor) -> float | None:
    """Over what is not missing; None where everything is."""
    known = column[~column.isnan()].tolist()
    return sum(known) / len(known) if known else None
