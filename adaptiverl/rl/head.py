"""From hidden states to log-probabilities, never holding the logits of all tokens.

The projection to V words is made for CHUNK tokens at a time, in one buffer that is used again, and
the gradient of REINFORCE, Σ w log π, is formed while a chunk's probabilities are there. The buffer
is [V, tokens]: on a CPU that makes the products and the sums along V up to twice as fast.

Logits are fp32 whatever the precision: GPT-2's lie around −100, where bf16 numbers are 0.5 apart.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

CHUNK = 256  # tokens; with fewer the products are slower, more only take memory
FOLD = 256  # words


def computed_in(weight: Tensor) -> torch.dtype:
    """Autocast's type where that is on, else the weight's own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _operands(weight: Tensor) -> torch.dtype:
    """The type of what is multiplied: CUDA alone multiplies half precision to fp32 results."""
    return computed_in(weight) if weight.is_cuda and torch.version.cuda else torch.float32


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in fp32."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)


def keep_logits_fp32(lm: Any) -> None:
    """Makes the model's own code project to fp32 logits, too, of the same operands."""
    for part in lm.get_output_embeddings().modules():  # an adapter's, too
        if type(part) is torch.nn.Linear:
            part.forward = partial(_fp32_logits, part)  # type: ignore[method-assign]


def _fp32_logits(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """nn.Linear's forward [..., D] → [..., V]."""
    dtype = _operands(head.weight)
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight = hidden.to(dtype), head.weight.to(dtype)
        if dtype == torch.float32 or torch.is_grad_enabled():
            bias = None if head.bias is None else head.bias.float()
            return linear(hidden.float(), weight.float(), bias)
        logits = _product(hidden.flatten(0, -2), weight.t()).unflatten(0, hidden.shape[:-1])
        return logits if head.bias is None else logits + head.bias


class Projection:
    """Logits of a few hidden states at a time, fp32, in one buffer.

    `weight` is [V, D], `bias` [V, 1] or None.
    """

    def __init__(self, head: torch.nn.Linear, temperature: float = 1.0):
        device = head.weight.device
        # itself, where there is nothing to cast
        self.weight = head.weight.detach().to(_operands(head.weight))
        self.bias = None if head.bias is None else head.bias.detach().float()[:, None]
        self.temperature = temperature
        self.buffer = torch.empty(0, device=device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[V, n] for `hidden` [n, D], over the temperature; valid until the next call."""
        size = len(self.weight) * len(hidden)
        if self.buffer.numel() < size:
            self.buffer = self.buffer.new_empty(size)
        logits = self.buffer[:size].view(-1, len(hidden))
        _product(self.weight, self.states(hidden).t(), out=logits)
        if self.bias is not None:
            logits += self.bias / self.temperature
        return logits

    def states(self, hidden: Tensor) -> Tensor:
        """What is multiplied: `hidden` over the temperature."""
        return (hidden.detach() / self.temperature).to(self.weight.dtype)


def exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits − m) in place of the logits [V, n], and m [n], a column's largest logit."""
    largest = _largest(logits)
    return logits.sub_(largest).exp_(), largest


def _largest(logits: Tensor) -> Tensor:
    """logits.amax(0), which on a CPU is up to 20 × slower where n is no multiple of 32."""
    words, n = logits.shape
    even = words // FOLD * FOLD
    folded = logits[:even].view(FOLD, -1, n).amax(0)
    return torch.cat([folded, logits[even:]]).amax(0)


@torch.no_grad()
def plain_logprobs(
    hidden: Tensor, head: torch.nn.Linear, tokens: Tensor, temperature: float = 1.0
) -> Tensor:
    """log π of `tokens` [N] after `hidden` [N, D], without gradient."""
    projection, parts = Projection(head, temperature), []
    for states, chosen in zip(hidden.split(CHUNK), tokens.split(CHUNK), strict=True):
        logits = projection.logits(states)
        own = logits.gather(0, chosen[None])[0]
        relative, largest = exponentials_(logits)
        parts.append(own - (largest + relative.sum(0).log()))
    return torch.cat(parts)


def weighted_logprobs(
    hidden: Tensor,
    head: torch.nn.Linear,
    tokens: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ weights · log π(tokens), differentiable, with log π and the entropy at each token, which
    are not.

    `hidden` is [N, D], `tokens` and `weights` [N]. Weights take no gradient: they are known before
    the policy's pass, so that pass forms the gradient too, by three products and not four.
    """
    score, logprobs, entropy = _WeightedLogprobs.apply(
        hidden, head.weight, head.bias, head, tokens, weights, temperature
    )
    return score, logprobs, entropy


class _WeightedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: torch.nn.Linear,
        tokens: Tensor,
        weights: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        train_weight, train_bias = ctx.needs_input_grad[1:3]
        project = Projection(head, temperature)
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if train_weight else None
        by_bias = weight.new_zeros(len(weight), dtype=torch.float32) if train_bias else None
        by_hidden, logprobs, entropy = [], [], []
        scales = weights.float() / temperature
        for states, chosen, scale in zip(
            hidden.split(CHUNK), tokens.split(CHUNK), scales.split(CHUNK), strict=True
        ):
            logits = project.logits(states)
            own = logits.gather(0, chosen[None])[0]
            relative, largest = exponentials_(logits)  # the probabilities times total
            total = relative.sum(0)
            log_z = largest + total.log()
            logprobs.append(own - log_z)

            # ∂ log π(y)/∂h = (W_y − Σ_v π(v) W_v)/τ, and Σ_v π(v) logit(v) is h · Σ_v π(v) W_v / τ
            rounded = relative.to(project.weight.dtype)
            # Over the sum of what was rounded, or what all words have in common would not cancel.
            by = total if rounded is relative else rounded.sum(0, dtype=torch.float32)
            mean = _product(rounded.t(), project.weight) / by[:, None]
            mean_logit = (project.states(states) * mean).sum(-1)
            states = states.float()
            if project.bias is not None:
                mean_logit += torch.mv(relative.t(), project.bias[:, 0]) / total / temperature
            entropy.append(log_z - mean_logit)
            by_hidden.append(scale[:, None] * (project.weight[chosen].float() - mean))

            # ∂ log π(y)/∂W_v = (1[v = y] − π(v)) h/τ
            if by_weight is not None:
                by_weight.index_add_(0, chosen, scale[:, None] * states)
                by_weight.addmm_(relative, (scale / total)[:, None] * states, alpha=-1)
            if by_bias is not None:
                by_bias.index_add_(0, chosen, scale)
                by_bias.addmv_(relative, scale / total, alpha=-1)
        ctx.save_for_backward(torch.cat(by_hidden).to(hidden.dtype), by_weight, by_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        logprob, entropies = torch.cat(logprobs), torch.cat(entropy)
        ctx.mark_non_differentiable(logprob, entropies)
        return (weights * logprob).sum(), logprob, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, score: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight, by_bias = ctx.saved_tensors
        # In place: a second backward pass through the same graph is an error, not a wrong number.
        grads = [by_hidden.mul_(score)]
        for grad, dtype in zip((by_weight, by_bias), ctx.dtypes, strict=True):
            grads.append(None if grad is None else grad.mul_(score).to(dtype))
        return (*grads, None, None, None, None)
