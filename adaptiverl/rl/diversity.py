"""How much a policy repeats itself, which shows early that it exploits a reward."""

from collections import Counter
from collections.abc import Sequence

Ids = Sequence[Sequence[int]]
OWN_TEXTS = 0.8  # equal pairs of two prompts per equal pair of one: below it prompts are answered


def distinct(completions: Ids, n: int) -> float:
    """Different n-grams / all n-grams of the batch (Li et al. 2016); 1 if there are none."""
    grams = [gram for ids in completions for gram in _grams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(completions: Ids, n: int = 3) -> float:
    """The share of n-grams that occurred before in their own completion; 0 if there are none."""
    every = [_grams(ids, n) for ids in completions]
    count = sum(map(len, every))
    return 1 - sum(len(set(grams)) for grams in every) / count if count else 0.0


def equal_pairs(completions: Ids, group_size: int) -> tuple[float, float]:
    """The shares of equal pairs of completions of one prompt, and of two: 1 if all are equal.

    `group_size` completions in a row are of one prompt. 0 where there are no such pairs.
    """
    texts = [tuple(ids) for ids in completions]
    groups = [texts[k : k + group_size] for k in range(0, len(texts), group_size)]
    within, all_within = (sum(map(count, groups)) for count in (_equal, _pairs))
    across, all_across = _equal(texts) - within, _pairs(texts) - all_within
    return within / max(all_within, 1), across / max(all_across, 1)


def is_answering(within: float, across: float) -> bool:
    """Whether prompts have texts of their own, by the shares that `equal_pairs` gives."""
    return across < OWN_TEXTS * within


def _equal(texts: Sequence[tuple[int, ...]]) -> int:
    return sum(n * (n - 1) // 2 for n in Counter(texts).values())


def _pairs(texts: Sequence[tuple[int, ...]]) -> int:
    return len(texts) * (len(texts) - 1) // 2


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[k:] for k in range(n)), strict=False))
