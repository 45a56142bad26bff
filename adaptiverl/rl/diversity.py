"""How much a policy repeats itself, which shows early that it exploits a reward."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

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


def equal_pairs(completions: Ids, prompts: Sequence[str]) -> tuple[float, float]:
    """The shares of equal pairs of completions of one prompt, and of two: 1 if all are equal.

    `prompts` has the prompt of each completion. 0 where there are no such pairs.
    """
    texts = [tuple(ids) for ids in completions]
    within, all_within = _equal(zip(prompts, texts, strict=True)), _equal(prompts)
    across, all_across = _equal(texts) - within, math.comb(len(texts), 2) - all_within
    return within / max(all_within, 1), across / max(all_across, 1)


def is_answering(within: float, across: float) -> bool:
    """Whether prompts have texts of their own, by the shares that `equal_pairs` gives."""
    return across < OWN_TEXTS * within


def _equal(values: Iterable[Hashable]) -> int:
    """How many pairs of them are equal."""
    return sum(math.comb(n, 2) for n in Counter(values).values())


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[k:] for k in range(n)), strict=False))
