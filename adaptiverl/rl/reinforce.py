"""REINFORCE as pure functions of tensors: advantages, KL, weights of the gradient.

No model, no sampling, no state.

A missing reward is NaN: it takes no part in a baseline, and its completion gets no advantage.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Baselines: (rewards [B], NaN where missing; group_size; ema) → [B]. Where all rewards that are
# compared are equal, batch and rloo are exactly these: an optimizer that normalises its updates
# would turn rounding errors into whole steps.


def _none(rewards: Tensor, group_size: int, ema: float | None) -> Tensor:
    return torch.zeros_like(rewards)


def _ema(rewards: Tensor, group_size: int, ema: float | None) -> Tensor:
    return _batch(rewards, group_size, ema) if ema is None else torch.full_like(rewards, ema)


def _batch(rewards: Tensor, group_size: int, ema: float | None) -> Tensor:
    mean = rewards.nan_to_num(0.0).sum() / (~rewards.isnan()).sum().clamp(min=1)
    return torch.where(_equal(rewards), rewards, mean)


def _rloo(rewards: Tensor, group_size: int, ema: float | None) -> Tensor:
    groups = _groups(rewards, group_size)
    known, count = groups.nan_to_num(0.0), (~groups.isnan()).sum(-1, keepdim=True)
    others = (known.sum(-1, keepdim=True) - known) / (count - 1).clamp(min=1)
    return torch.where(_equal(groups), groups, others).reshape(-1)


BASELINES: dict[str, Callable[[Tensor, int, float | None], Tensor]] = {
    "none": _none,
    "ema": _ema,
    "batch": _batch,
    "rloo": _rloo,
}
PER_PROMPT = {"rloo"}  # baselines that compare the completions of one prompt, not of the batch
COMPARE_NONE = {"none", "ema"}  # those that a single completion can be trained with


def advantages(
    rewards: Tensor,
    baseline: str = "rloo",
    *,
    group_size: int = 1,
    ema: float | None = None,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """How much better each completion was than its baseline, and the weight of a unit of reward.

    Both are [B] and 0 where the reward is missing: advantage = weight · (reward − baseline).

    `rewards` is [B], completions of one prompt side by side in groups of `group_size`.
    `baseline` is one of BASELINES:
      none   0;
      ema    `ema`, the running mean of earlier batches, or this batch's mean before there is one;
      batch  the mean over the batch;
      rloo   the mean over the *other* completions of the same prompt (Kool et al. 2019), over the
             other completions of the batch if each prompt has one.
    The weight is 1. With `normalize` it is 1 / (r + 1e-4), where r is the root mean square of the
    advantages. Raises ValueError for an unknown baseline.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, not {baseline!r}")
    present = ~rewards.isnan()
    base = BASELINES[baseline](rewards, group_size, ema)
    advantage, weight = (rewards - base).where(present, 0.0), present.to(rewards)
    if normalize and present.any():
        weight = weight / (advantage[present].square().mean().sqrt() + 1e-4)
    return advantage * weight, weight


def zero_std_share(rewards: Tensor, group_size: int = 1) -> float:
    """The share of groups in which all rewards that are not missing are the same, 0 to 1.

    `rewards` and groups are those of `advantages`: the batch is one group if `group_size` is 1.
    """
    return _equal(_groups(rewards, group_size)).float().mean().item()


def is_informative(rewards: Tensor, baseline: str, group_size: int = 1) -> bool:
    """Whether any rewards [B] that `baseline` compares with each other differ.

    A single one tells something where the baseline compares none.
    """
    if baseline in COMPARE_NONE and (~rewards.isnan()).sum() == 1:
        return True
    return zero_std_share(rewards, group_size if baseline in PER_PROMPT else 1) < 1


def are_compared(rewards: Tensor, baseline: str, group_size: int = 1) -> bool:
    """Whether `baseline` compares any two rewards [B] that are not missing."""
    groups = _groups(rewards, group_size if baseline in PER_PROMPT else 1)
    return bool((~groups.isnan()).sum(-1).max() > 1)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    """The rewards that are compared with each other, one row per group."""
    return rewards.view(-1, group_size if group_size > 1 else len(rewards))


def _equal(rewards: Tensor) -> Tensor:
    """Whether all rewards of a row that are not missing are the same: [..., 1]."""
    lowest = rewards.nan_to_num(torch.inf).amin(-1, keepdim=True)
    return rewards.nan_to_num(-torch.inf).amax(-1, keepdim=True) <= lowest


def kl_per_token(logprobs: Tensor, reference: Tensor, estimator: str = "k1") -> Tensor:
    """Estimates KL(policy ‖ reference) in nats at each sampled token (Schulman 2020).

    k1, log π − log ref, is unbiased; k3, ref/π − 1 − log(ref/π), is also never negative.
    """
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k3":
        return log_ratio.exp() - 1 - log_ratio
    raise ValueError(f"KL estimator must be k1 or k3, not {estimator!r}")


def token_weights(
    logprobs: Tensor,
    mask: Tensor,
    advantage: Tensor,
    *,
    reference: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    estimator: str = "k1",
) -> Tensor:
    """w [B, T], such that the policy gradient is the sum of w ∇ log π over all tokens.

    That is the gradient of the mean over completions of A Σₜ log πₜ. `logprobs`, `mask` and
    `reference` are [B, T]. `advantage` is [B] and already contains the KL penalty of its
    completion. `kl_coef` is a number or [B], in the advantage's units. With both estimators the
    expected gradient is that of reward − kl_coef · KL: the derivative of the estimate k3 itself is
    added here; that of k1 has the expectation 0 and is left out.
    """
    weights = advantage[:, None].expand_as(logprobs)
    if reference is not None and estimator == "k3":
        coef = torch.as_tensor(kl_coef, dtype=logprobs.dtype, device=logprobs.device).view(-1, 1)
        weights = weights - coef * (1 - (reference - logprobs).exp())
    return weights * mask / len(mask)


def adapt_kl_coef(coef: float, kl: float, target: float, gain: float = 0.1) -> float:
    """The next KL coefficient: up when `kl` is above `target`, else down, at most 10 %.

    The proportional controller of Ziegler et al. 2019, in nats per completion.
    """
    error = min(max(kl / target - 1.0, -1.0), 1.0)
    return coef * (1.0 + gain * error)


def updated_ema(ema: float | None, rewards: Tensor) -> float | None:
    """The running mean after one more batch of rewards [B]; a batch without a reward leaves it."""
    if rewards.isnan().all():
        return ema
    mean = rewards.nanmean().item()
    return mean if ema is None else 0.9 * ema + 0.1 * mean
