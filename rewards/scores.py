"""What a reward returned, as one finite score or None for each completion."""

import logging
import math
from collections.abc import Mapping, Sequence, Set, Sized
from typing import Any

from rewards.messages import Text, text_of

log = logging.getLogger(__name__)
LARGEST = 1e16  # training computes in float32, which holds no sum of squares of larger ones


def finite(value: float) -> bool:
    """Whether it is a number, and one that training can compute with."""
    return abs(value) <= LARGEST


def checked(name: str, answer: Any, completions: Sequence[Text]) -> tuple[list[float | None], int]:
    """The scores that the reward `name` answered, and how many were not `finite`: now None.

    These are logged in one line. Raises ValueError for what is not one score per completion.
    """
    if not isinstance(answer, Sized) or isinstance(answer, Mapping | Set | str | bytes | bytearray):
        text = repr(answer)
        raise ValueError(
            f"reward {name!r} returned {text if len(text) < 60 else text[:59] + '…'}, not a list "
            "of one score per completion"
        )
    values: list[Any] = list(answer)  # type: ignore[call-overload]
    if len(values) != len(completions):
        raise ValueError(
            f"reward {name!r} returned {len(values)} scores for {len(completions)} completions"
        )
    told = [None if value is None else _number(value) for value in values]
    odd = [i for i, score in enumerate(told) if score is not None and not finite(score)]
    scores = [None if i in odd else score for i, score in enumerate(told)]
    if odd:
        log.warning(
            "reward %r is not finite, or beyond %g, for %d of %d completions and is left out "
            "there; the first: %s for %r",
            name,
            LARGEST,
            len(odd),
            len(scores),
            told[odd[0]],
            text_of(completions[odd[0]])[:80],
        )
    return scores, len(odd)


def _number(value: Any) -> float:
    """As a float; infinite where it is an integer that no float can hold."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
