"""How far an update moved the policy: the KL that the trust region holds, on a few completions."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.precision import in_fp32
from adaptiverl.rl.reinforce import kl_per_token
from adaptiverl.rl.rollout import Rollout
from adaptiverl.training.runtime import Runtime

EVERY = 8  # an update is measured on one completion in so many,
LEAST = 2  # on at least so many, or on all,
FEW_TOKENS = 32  # and where these have fewer tokens, over the whole vocabulary


@dataclass(frozen=True)
class Precision:
    """How the log-probabilities of sampling and of measuring are related."""

    sampler_matches_policy: bool  # but for fp32 rounding
    low_precision: bool  # they are rounded even where a policy computes in fp32


class UpdateKL:
    """Made before an update; called after it: KL(policy before ‖ policy now), nats per token.

    The policy before is the one that sampled `rollout`. The KL is over the probes of all processes,
    which must all call it. `min_kl` is twice what rounding alone may give. `first` is the number of
    this process's first completion among `batch_size`.
    """

    def __init__(
        self,
        runtime: Runtime,
        policy: Policy,
        rollout: Rollout,
        first: int,
        batch_size: int,
        precision: Precision,
    ):
        self.runtime, self.policy, self.precision = runtime, policy, precision
        # Of the whole batch, so that processes probe what one alone would; each needs a row.
        size = len(rollout)
        stride = min(EVERY, max(batch_size // LEAST, 1), size)
        rows = torch.arange(-first % stride, size, stride, device=rollout.prompt_of.device)
        self.probe = rollout.select(rows)
        # One sampled token says little: k3 of 8 of them is off by a factor of three either way. The
        # tables [tokens, V] of more would fill memory, and k3 of 32 is off by a third. Where
        # precision is low, the comparison is with sampling, which knows the sampled tokens alone.
        (self.tokens,) = runtime.reduce(self.probe.completion_mask.sum()[None])
        self.exact = self.tokens < FEW_TOKENS and not precision.low_precision
        sampled = self.probe.logprobs
        self.before = (
            sampled if precision.sampler_matches_policy and not self.exact else self._measure()
        )
        self.min_kl = 2 * self._kl(sampled, self.before) if precision.low_precision else 0.0

    def __call__(self) -> float:
        return self._kl(self.before, self._measure())

    def _measure(self) -> Tensor:
        """In full precision where there is one: rounding errors exceed small updates."""
        low = self.precision.low_precision
        measure = self.policy.distributions if self.exact else self.policy.logprobs
        with nullcontext() if low else in_fp32(self.policy):
            return self.runtime.no_grad(measure, self.probe, autocast=low)

    def _kl(self, old: Tensor, new: Tensor) -> float:
        kl = kl_per_token(old, new, "k3")
        if self.exact:  # the expectation of k3; a token that neither can give is no difference
            kl = torch.where(old == new, 0.0, old.exp() * kl)
        (total,) = self.runtime.reduce(kl.sum()[None])
        return total / self.tokens
