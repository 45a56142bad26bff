"""Means of paired samples with their standard errors: pure functions of numbers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A mean with its standard error; None where there are no values, or too few for an error."""

    mean: float | None
    se: float | None


def estimate(values: Tensor, clusters: Sequence[int]) -> Estimate:
    """The mean of `values` [n], NaN where one is missing, and its cluster-robust standard error.

    `clusters` [n] number the prompts: completions of one prompt are alike, so their deviations are
    summed before they are squared. With one completion of each prompt that is the usual s / √n,
    and with one prompt for all the completions count as independent.
    """
    known = ~values.isnan()
    x, n = values[known].double(), int(known.sum())
    if not n:
        return Estimate(None, None)
    mean = x.mean().item()
    which = torch.tensor(clusters)[known].unique(return_inverse=True)[1]
    if which.max() == 0:
        which = torch.arange(n)
    groups = int(which.max()) + 1
    if groups < 2:
        return Estimate(mean, None)
    sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, which, x - mean)
    variance = sums.square().sum().item() * groups / (groups - 1)
    return Estimate(mean, math.sqrt(variance) / n)


def compare(trained: Tensor, start: Tensor, clusters: Sequence[int]) -> dict[str, Estimate]:
    """Of two samples [n] whose rows belong together, NaN where one is missing.

    `trained` and `start` are their means, `difference` is that of trained − start, and `win_rate`
    is the share of rows in which trained is larger, ties counted half; the last two are over the
    rows in which both are known.
    """
    difference = trained - start
    wins = ((difference.sign() + 1) / 2).masked_fill(difference.isnan(), torch.nan)
    return {
        "trained": estimate(trained, clusters),
        "start": estimate(start, clusters),
        "difference": estimate(difference, clusters),
        "win_rate": estimate(wins, clusters),
    }
