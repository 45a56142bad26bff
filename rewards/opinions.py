"""How opinions on the same completions compare: people's labels and the scores of rewards."""

from collections.abc import Sequence

import numpy as np

Column = Sequence[float | None]


def agreement(labels: Sequence[float], scores: Sequence[float]) -> float | None:
    """Of the pairs with different labels, the share that the scores order alike; ties count half.

    None where all labels are equal.
    """
    own, others = np.array(labels), np.array(scores)
    products = np.sign(own[:, None] - own) * np.sign(others[:, None] - others)
    differ = own[:, None] > own
    return float((products[differ] + 1).mean() / 2) if differ.any() else None


def asking_order(opinions: Sequence[Column], count: int) -> list[int]:
    """Rows 0 … count − 1, those first on which `opinions` disagree most.

    Disagreement is the variance of a row's ranks in each opinion, since scales differ. What fewer
    than two have an opinion of comes last, in the order of the batch.
    """
    ranks = np.full((len(opinions), count), np.nan)
    for row, opinion in zip(ranks, opinions, strict=True):
        x = np.array(opinion, dtype=np.float64)  # None is NaN
        known = x[~np.isnan(x)]
        row[:] = np.sign(x[:, None] - known).sum(1) / max(len(known) - 1, 1)
        row[np.isnan(x)] = np.nan
    several = (~np.isnan(ranks)).sum(0) > 1
    variance = np.full(count, -1.0)
    if several.any():
        variance[several] = np.nanvar(ranks[:, several], axis=0).round(9)  # rounding is no order
    return np.argsort(-variance, kind="stable").tolist()
