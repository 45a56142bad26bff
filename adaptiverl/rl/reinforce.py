"""REINFORCE as pure functions of tensors: advantages, KL, weights of the gradient.

No model, no sampling, no state.

A missing reward is NaN: it takes no part in a baseline and its completion gets no advantage.
"""

import torch
from torch import Tensor


def advantages(
    rewards: Tensor,
    baseline: str = "rloo",
    *,
    group_size: int = 1,
    ema: float | None = None,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """How much better each completion was than its baseline, and what a unit of reward weighs.

    Both are [B] and 0 where the reward is missing: advantage = weight · (reward − baseline).

    `rewards` is [B], completions of one prompt side by side in groups of `group_size`.
    `baseline` is one of
      none   0;
      ema    `ema`, the running mean of earlier batches, or this batch's mean before there is one;
      batch  the mean over the batch;
      rloo   the mean over the *other* completions of the same prompt (Kool et al. 2019), over the
             other completions of the batch where each prompt has one.
    Where all rewards that are compared are equal, batch and rloo give exactly 0: an optimizer that
    normalises its updates would make whole steps of rounding errors. The weight is 1, or with
    `normalize` one over the advantages' root mean square plus 1e-4.
    """
    present = ~rewards.isnan()
    known = rewards.nan_to_num(0.0)
    if baseline == "none":
        base = torch.zeros_like(known)
    elif baseline == "ema" and ema is not None:
        base = torch.full_like(known, ema)
    elif baseline in ("ema", "batch"):
        mean = known.sum() / present.sum().clamp(min=1)
        base = torch.where(_equal(rewards), known, mean)
    elif baseline == "rloo":
        groups = known.view(-1, group_size if group_size > 1 else len(known))
        count = present.view_as(groups).sum(-1, keepdim=True)
        others = (groups.sum(-1, keepdim=True) - groups) / (count - 1).clamp(min=1)
        base = torch.where(_equal(rewards.view_as(groups)), groups, others).reshape(-1)
    else:
        raise ValueError(f"baseline must be none, ema, batch or rloo, not {baseline!r}")
    advantage, weight = (known - base) * present, present.to(known)
    if normalize and present.any():
        weight = weight / (advantage[present].square().mean().sqrt() + 1e-4)
    return advantage * weight, weight


def zero_std_share(rewards: Tensor, group_size: int = 1) -> float:
    """The share of groups in which all rewards that are not missing are the same, 0 to 1.

    `rewards` and groups are those of `advantages`: the batch is one where `group_size` is 1.
    """
    groups = rewards.view(-1, group_size if group_size > 1 else len(rewards))
    return _equal(groups).float().mean().item()


def _equal(rewards: Tensor) -> Tensor:
    """Whether all of a row that are not missing are the same, or it has none: [..., 1]."""
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
    `reference` are [B, T]; `advantage` is [B] and already carries the KL penalty of its completion;
    `kl_coef` is a number or [B], in the advantage's units. The estimate k3 depends on the policy
    beyond the sampled tokens' probability, so its own derivative is added, and the expected
    gradient is that of reward − kl_coef · KL for both estimators. (k1's own derivative has
    expectation 0: left out.)
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
