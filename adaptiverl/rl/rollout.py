"""Rollouts: sampling completions, and the log-probabilities of what was sampled.

Layout of every tensor here: prompts padded on the left, completions on the right,
    [pad pad p p p | c c eos pad]      prompt [B, P], completion [B, T].
Masks come from positions, never from `!= pad`, because GPT-2's pad is its EOS. A completion's mask
ends with its first EOS, included. Log-probabilities are those of softmax(logits / temperature),
the distribution that is sampled; top-k and top-p bend it further, and that part is not in them.
Leaves out speed: one Python pass a token, whole logits in the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

Forward = Callable[..., tuple[Tensor, object]]  # as Policy.forward


@dataclass(frozen=True)
class Rollout:
    """A batch of sampled completions; `logprobs` are those measured while sampling."""

    prompt_ids: Tensor  # [B, P]
    prompt_mask: Tensor  # [B, P]
    completion_ids: Tensor  # [B, T]
    completion_mask: Tensor  # [B, T]
    logprobs: Tensor  # [B, T], 0 where masked

    def __len__(self) -> int:
        return len(self.completion_ids)

    def part(self, rows: slice) -> "Rollout":
        """Some of the completions, cut to the longest of them."""
        width = max(1, int(self.completion_mask[rows].sum(-1).max()))
        narrow = {
            name: getattr(self, name)[rows, :width]
            for name in ("completion_ids", "completion_mask", "logprobs")
        }
        return replace(
            self, prompt_ids=self.prompt_ids[rows], prompt_mask=self.prompt_mask[rows], **narrow
        )

    def tokens(self) -> list[list[int]]:
        """Each completion's ids, its EOS included, padding left out."""
        lengths = self.completion_mask.sum(-1).tolist()
        return [row[:n] for row, n in zip(self.completion_ids.tolist(), lengths, strict=True)]


def uniforms(seed: int, step: int, batch_size: int, length: int) -> Tensor:
    """The random numbers of one step, [B, T] in [0, 1): the same for any number of processes.

    They follow from `seed` and `step` alone, so a resumed run needs no generator state.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.rand(batch_size, length, generator=generator, dtype=torch.float64)


def pick(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row from softmax(logits), by inverting its cumulative sum at `uniform` [B].

    One random number a row instead of one a vocabulary entry; float64, because a float32 sum
    over 50,000 entries is off by more than a rare token's probability.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    # right=True: the first entry whose sum exceeds the threshold, so never one of probability 0
    index = torch.searchsorted(cumulative, threshold, right=True)
    return index.clamp(max=logits.shape[-1] - 1).squeeze(-1)


@torch.no_grad()
def sample(
    forward: Forward,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniform: Tensor,
    *,
    eos_ids: Tensor,
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rollout:
    """Completions of at most `uniform.shape[1]` tokens for left-padded prompts [B, P]."""
    bend = LogitsProcessorList()
    if top_k:
        bend.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        bend.append(TopPLogitsWarper(top_p))

    cache = None
    alive = torch.ones(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    ids, mask = prompt_ids, prompt_mask
    tokens, masks, logprobs = [], [], []
    for t in range(uniform.shape[1]):
        logits, cache = forward(ids, mask, keep=1, use_cache=True, cache=cache)
        logits = logits[:, -1].float() / temperature  # [B, V]
        token = pick(bend(ids, logits), uniform[:, t])
        logprob = logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)
        tokens.append(token.where(alive, pad_id))
        masks.append(alive)
        logprobs.append(logprob.where(alive, 0.0))
        alive = alive & ~torch.isin(token, eos_ids)
        if not alive.any():
            break
        ids = tokens[-1][:, None]
        mask = torch.cat([mask, masks[-1][:, None].to(mask.dtype)], dim=1)
    return Rollout(
        prompt_ids,
        prompt_mask,
        torch.stack(tokens, 1),
        torch.stack(masks, 1).to(prompt_mask.dtype),
        torch.stack(logprobs, 1),
    )


def token_logprobs(
    forward: Forward, rollout: Rollout, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion token and entropy at it, both [B, T] and 0 where masked.

    One full pass, differentiable; the entropy is only for the logs and carries no gradient.
    """
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)
    length = rollout.completion_ids.shape[1]
    logits, _ = forward(ids, mask, keep=length + 1)
    logits = logits[:, :-1].float() / temperature  # [B, T, V]
    log_z = logits.logsumexp(-1)
    chosen = logits.gather(-1, rollout.completion_ids[..., None]).squeeze(-1) - log_z
    with torch.no_grad():
        entropy = log_z - (logits.softmax(-1) * logits).sum(-1)
    return chosen * rollout.completion_mask, entropy * rollout.completion_mask


def check_logprobs(forward: Forward, rollout: Rollout, temperature: float, exact: bool) -> float:
    """Stops a run whose sampled and recomputed log-probabilities disagree; returns the largest gap.

    `exact` (fp32 weights and arithmetic) allows 1e-3 at any token. Otherwise rounding moves single
    tokens, and the mean gap may be 0.05. Raises ValueError with the likely cause.
    """
    with torch.no_grad():
        again, _ = token_logprobs(forward, rollout, temperature)
    gap = (again - rollout.logprobs).abs()
    mean = (gap.sum() / rollout.completion_mask.sum()).item()
    worst = gap.max().item()
    if (worst if exact else mean) <= (1e-3 if exact else 0.05):
        return worst
    padded = rollout.prompt_mask.min(-1).values == 0
    by_row = gap.max(-1).values
    if padded.any() and not padded.all() and by_row[padded].min() > 10 * by_row[~padded].max():
        cause = "only padded prompts are off: the model ignores position_ids or the attention mask"
    else:
        cause = "all prompts are off: dropout is on, or the model's cache and its full pass differ"
    raise ValueError(
        f"the log-probabilities of the samples and of the loss differ by up to {worst:.2g} nats "
        f"a token ({mean:.2g} on average); training on them would be wrong. Likely cause: {cause}"
    )
