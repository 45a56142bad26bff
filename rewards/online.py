"""A reward head that learns from labels while they are given, and says how far to trust it.

Ridge regression on the words and pairs of words of a completion; λ by leave-one-out. Made anew from
the labels each time, so it has no state to save. Leaves out the prompt: few labels cannot tell.
"""

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

LEAST = 20  # labels that it takes to say anything
LAST = 1000  # labels it learns from
SIZE = 4096  # places that words are hashed into
LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class OnlineHead:
    """Fitted to `texts` [n] and their `labels` [n], −1 to 1; raises ValueError for too few.

    `error` is the root mean square of what it says of each label from the others, `error_of_mean`
    of their mean instead, and `slope` how much labels rise where what it says rises by 1: below 1
    it exaggerates.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[float]):
        if len(texts) < LEAST:
            raise ValueError(f"{len(texts)} labels are fewer than {LEAST}")
        y = np.array(labels, dtype=np.float64)
        n, x = len(y), _features(texts)
        self.mean, self.centre = y.mean(), x.mean(0)
        self.x = x - self.centre  # so that leaving one out leaves it out of the means, too
        values, vectors = np.linalg.eigh(self.x @ self.x.T)
        along = vectors.T @ (y - self.mean)
        fits = {}
        for penalty in LAMBDAS:
            kept = values.clip(0) / (values.clip(0) + penalty)  # of each direction
            hat = 1 / n + (vectors**2) @ kept
            left = (y - self.mean - vectors @ (kept * along)) / (1 - hat).clip(1e-6)
            fits[penalty] = y - left  # what is said of each from the others
        self.penalty = min(fits, key=lambda penalty: ((y - fits[penalty]) ** 2).sum())
        said = fits[self.penalty]
        self.error = float(np.sqrt(((y - said) ** 2).mean()))
        self.error_of_mean = float(y.std() * n / (n - 1))  # each from the mean of the others
        spread = said - said.mean()
        variance = (spread**2).sum()
        told = variance > 1e-9 * n  # or what it says is always the same
        self.slope = float((spread * (y - self.mean)).sum() / variance) if told else 0.0
        self.weights = vectors @ (along / (values.clip(0) + self.penalty))

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """What it takes the labels of `texts` to be, −1 to 1."""
        said = self.mean + (_features(texts) - self.centre) @ self.x.T @ self.weights
        return said.clip(-1, 1).tolist()


def _features(texts: Sequence[str]) -> np.ndarray:
    """[n, SIZE], rows of length 1."""
    x = np.zeros((len(texts), SIZE))
    for row, text in zip(x, texts, strict=True):
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        for word in [*words, *map(" ".join, pairwise(words))]:
            row[zlib.crc32(word.encode()) % SIZE] += 1
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
