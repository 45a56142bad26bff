"""From hidden states to log-probabilities, without ever holding the logits of all tokens.

The logits are computed for CHUNK tokens at a time. The gradient of REINFORCE, Σ w log π, is
computed while a chunk's probabilities are there; any other gradient by computing them again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from adaptiverl.rl.projection import Projection, exponentials_, fp32_product, logprobs_

CHUNK = 256  # tokens; with fewer the products are slower, more only take memory
CHUNK_ON_GPU = 1024  # tokens; a GPU would wait for the launches of smaller ones
EVEN = 8  # tokens are padded to a multiple of it: else products take up to 1.6 times as long


def _chunk(hidden: Tensor) -> int:
    return CHUNK_ON_GPU if hidden.is_cuda else CHUNK


def _even(x: Tensor) -> Tensor:
    """[N, …] with zeros below, up to the next multiple of EVEN."""
    return pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % EVEN))


@torch.no_grad()
def plain_logprobs(
    hidden: Tensor, head: torch.nn.Linear, tokens: Tensor, temperature: float = 1.0
) -> Tensor:
    """log π of `tokens` [N] after `hidden` [N, D], without gradient."""
    projection, chunk = Projection(head, temperature), _chunk(hidden)
    chunks = zip(_even(hidden).split(chunk), _even(tokens).split(chunk), strict=True)
    result = [logprobs_(projection.logits(states), own) for states, own in chunks]
    return torch.cat(result)[: len(tokens)]


def token_logprobs(
    hidden: Tensor,
    head: torch.nn.Linear,
    tokens: Tensor,
    weights: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Σ weights · log π, and log π and the entropy of `tokens` [N] after `hidden` [N, D].

    With `weights` [N] only the sum is differentiable. They get no gradient themselves: they are
    known before this pass, so it computes the gradient, too, by three products instead of five.
    Without weights the sum is None and log π is differentiable: backward computes the logits again.
    The entropy, in nats, never has a gradient.
    """
    return _TokenLogprobs.apply(hidden, head.weight, head.bias, head, tokens, weights, temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: torch.nn.Linear,
        tokens: Tensor,
        weights: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        project, trained = Projection(head, temperature), ctx.needs_input_grad[1:3]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.weighted = weights is not None
        if weights is None:
            logprobs, entropy, *_ = _in_chunks(project, hidden, tokens)
            ctx.project = project  # made here: backward may run without autocast
            ctx.save_for_backward(hidden, tokens, weight, bias)  # the last two to notice changes
            ctx.mark_non_differentiable(entropy)
            return None, logprobs, entropy
        scales = weights.float() / temperature
        logprobs, entropy, *grads = _in_chunks(project, hidden, tokens, scales, trained)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(logprobs, entropy)
        return (weights * logprobs).sum(), logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, by_score: Tensor, by_logprobs: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.weighted:
            # In place: a second backward pass through the graph is an error, not a wrong number.
            grads = [None if g is None else g.mul_(by_score) for g in ctx.saved_tensors]
        else:
            hidden, tokens, *_ = ctx.saved_tensors
            scales = by_logprobs.float() / ctx.project.temperature
            trained = ctx.needs_input_grad[1:3]
            grads = list(_in_chunks(ctx.project, hidden, tokens, scales, trained)[2:])
        cast = [None if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)]
        return (*cast, None, None, None, None)


def _in_chunks(
    project: Projection,
    hidden: Tensor,
    tokens: Tensor,
    scales: Tensor | None = None,
    trained: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """log π and entropy of each token [N], and the gradient of Σ scales · temperature · log π.

    The gradient is that of `hidden`, and of the head's weight and bias if they are `trained`; None
    without `scales` [N].
    """
    size, count = len(project.weight), len(tokens)
    hidden, tokens = _even(hidden), _even(tokens)
    scales = None if scales is None else _even(scales)  # 0 below: no gradient
    by_weight = hidden.new_zeros(project.weight.shape, dtype=torch.float32) if trained[0] else None
    by_bias = hidden.new_zeros(size, dtype=torch.float32) if trained[1] else None
    by_hidden, logprobs, entropy = [], [], []
    chunk = _chunk(hidden)
    every_scale = (tokens if scales is None else scales).split(chunk)
    for states, chosen, scale in zip(
        hidden.split(chunk), tokens.split(chunk), every_scale, strict=True
    ):
        logits = project.logits(states)
        own = logits.gather(0, chosen[None])[0]
        relative, largest = exponentials_(logits)  # the probabilities times total
        total = relative.sum(0)
        log_z = largest + total.log()
        logprobs.append(own - log_z)

        # ∂ log π(y)/∂h = (W_y − Σ_v π(v) W_v)/τ, and Σ_v π(v) logit(v) is h · Σ_v π(v) W_v / τ
        rounded = relative.to(project.weight.dtype)
        # Over the sum of what was rounded, or what all logits have in common would not cancel.
        by = total if rounded is relative else rounded.sum(0, dtype=torch.float32)
        mean = fp32_product(rounded.t(), project.weight) / by[:, None]
        mean_logit = (project.states(states) * mean).sum(-1)
        if project.bias is not None:
            # Not mv, which autocast rounds on CUDA
            of_bias = fp32_product(relative.t(), project.bias)[:, 0]
            mean_logit += of_bias / total / project.temperature
        entropy.append(log_z - mean_logit)
        if scales is None:
            continue
        by_hidden.append(scale[:, None] * (project.weight[chosen].float() - mean))

        # ∂ log π(y)/∂W_v = (1[v = y] − π(v)) h/τ
        states = states.float()
        if by_weight is not None:
            by_weight.index_add_(0, chosen, scale[:, None] * states)
            if rounded.dtype == torch.bfloat16:  # fp16 does not hold numbers that small
                by_weight -= fp32_product(rounded, ((scale / by)[:, None] * states).bfloat16())
            else:
                by_weight.addmm_(relative, (scale / total)[:, None] * states, alpha=-1)
        if by_bias is not None:
            by_bias.index_add_(0, chosen, scale)
            by_bias.addmv_(relative, scale / total, alpha=-1)
    by_states = torch.cat(by_hidden)[:count].to(hidden.dtype) if by_hidden else None
    return torch.cat(logprobs)[:count], torch.cat(entropy)[:count], by_states, by_weight, by_bias
