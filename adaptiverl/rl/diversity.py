"""How much a policy repeats itself, which shows early that it exploits a reward."""

from collections.abc import Sequence

Ids = Sequence[Sequence[int]]


def distinct(completions: Ids, n: int) -> float:
    """Different n-grams / all n-grams of the batch (Li et al. 2016); 1 if there are none."""
    grams = [gram for ids in completions for gram in _grams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(completions: Ids, n: int = 3) -> float:
    """The share of n-grams that occurred before in their own completion; 0 if there are none."""
    every = [_grams(ids, n) for ids in completions]
    count = sum(map(len, every))
    return 1 - sum(len(set(grams)) for grams in every) / count if count else 0.0


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[k:] for k in range(n)), strict=False))
