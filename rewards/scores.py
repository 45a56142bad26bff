"""What a reward returned, as one finite score or None for each completion."""

import logging
from collections.abc import Mapping, Sequence, Set, Sized
from typing import Any

from rewards.messages import Text, text_of

log = logging.getLogger(__name__)
LARGEST = 3.4028234663852886e38  # of float32, in which training computes


def finite(value: float) -> bool:
    """Whether it is a number, and one that float32 has."""
    return abs(value) <= LARGEST


def checked(name: str, answer: Any, completions: Sequence[Text]) -> tuple[list[float | None], int]:
    """The scores that the reward `name` answered, and how many were not finite: now None.

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
    scores = [None if value is None else float(value) for value in values]
    odd = [i for i, score in enumerate(scores) if score is not None and not finite(score)]
    for i in odd:
        scores[i] = None
    if odd:
        log.warning(
            "reward %r is not finite for %d of %d completions and is left out there; the first: "
            "%s for %r",
            name,
            len(odd),
            len(scores),
            float(values[odd[0]]),
            text_of(completions[odd[0]])[:80],
        )
    return scores, len(odd)
