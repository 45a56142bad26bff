"""Rollouts: what was sampled, how a token is chosen, and the check that the loss sees the same.

Layout of every tensor here: prompts padded on the left, completions on the right,
    [pad pad p p p | c c eos pad]      prompt [Q, P], completion [B, T].
Masks come from positions, never from `!= pad`, because GPT-2's pad is its EOS. A completion's mask
ends with its first EOS, included. Log-probabilities are those of softmax(logits / temperature),
the distribution that is sampled; top-k and top-p bend it further, and that part is not in them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from adaptiverl.rl.head import exponentials_

BLOCK = 256  # words


@dataclass(frozen=True)
class Rollout:
    """A batch of sampled completions; `logprobs` are those measured while sampling."""

    prompt_ids: Tensor  # [Q, P], each prompt once
    prompt_mask: Tensor  # [Q, P]
    prompt_of: Tensor  # [B], the prompt of each completion
    completion_ids: Tensor  # [B, T]
    completion_mask: Tensor  # [B, T]
    logprobs: Tensor  # [B, T], 0 where masked

    def __len__(self) -> int:
        return len(self.completion_ids)

    def part(self, rows: Tensor) -> "Rollout":
        """Some of the completions and their prompts, without the padding that they share."""
        mask = self.completion_mask[rows]
        width = max(1, int(mask.sum(-1).max()))
        prompts, prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        longest = int(self.prompt_mask[prompts].sum(-1).max())
        return Rollout(
            self.prompt_ids[prompts, -longest:],
            self.prompt_mask[prompts, -longest:],
            prompt_of,
            self.completion_ids[rows, :width],
            mask[:, :width],
            self.logprobs[rows, :width],
        )

    def pieces(self, count: int) -> list[Tensor]:
        """All rows in `count` pieces of like length, so that little padding is computed."""
        if count == 1:
            return [torch.arange(len(self), device=self.prompt_of.device)]
        return list(self.completion_mask.sum(-1).argsort(stable=True).chunk(count))

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


def pick_(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A word for each column of softmax(logits) [V, n], and its log-probability; spoils `logits`.

    Inverts the cumulative sum at `uniform` [n]: one random number a token, not one a word. First
    among blocks of words, then within one: float64 is needed for sums over 50,000 words, where
    float32 is off by more than a rare word's probability, but not for those over 256.
    """
    words, n = logits.shape
    weights, _ = exponentials_(logits)
    even = words // BLOCK * BLOCK
    sums = torch.cat([weights[:even].view(-1, BLOCK, n).sum(1), weights[even:].sum(0)[None]])
    cumulative = sums.t().double().cumsum(-1)  # [n, blocks]
    total = cumulative[:, -1:]
    threshold = uniform[:, None] * total
    # right=True: the first entry whose sum exceeds the threshold, so never one of probability 0
    block = torch.searchsorted(cumulative, threshold, right=True).clamp(max=len(sums) - 1)
    end = cumulative.gather(1, block)
    size = sums.t().gather(1, block).double()
    # How far into the block, in [0, 1)
    fraction = ((threshold - (end - size)) / size).clamp(min=0, max=1 - 2**-52)
    index = block * BLOCK + torch.arange(BLOCK, device=logits.device)  # [n, BLOCK]
    column = torch.arange(n, device=logits.device)
    own = weights[index.clamp(max=words - 1), column[:, None]] * (index < words)
    within = own.double().cumsum(-1)
    word = torch.searchsorted(within, fraction * within[:, -1:], right=True)
    # NaN leads beyond the last word: it shows in the log-probability, which the host can look at,
    # and must not stop the device.
    token = (block * BLOCK + word.clamp(max=BLOCK - 1))[:, 0].clamp(max=words - 1)
    return token, (weights[token, column] / total[:, 0].float()).log()


@dataclass(frozen=True)
class Choice:
    """How a token is chosen, and what ends a completion."""

    eos_ids: Tensor
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities [n] from logits [V, n] over the temperature; spoils them.

        Top-k and top-p bend what is sampled, not the log-probability, and make copies.
        """
        bend = LogitsProcessorList()
        if self.top_k:
            bend.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            bend.append(TopPLogitsWarper(self.top_p))
        if not bend:
            return pick_(logits, uniform)
        token, _ = pick_(bend(None, logits.t()).t().contiguous(), uniform)
        own = logits.gather(0, token[None])[0]
        relative, largest = exponentials_(logits)
        return token, own - (largest + relative.sum(0).log())


def allowed_gap(exact: bool) -> float:
    """Nats per token by which sampling and the loss may differ; `exact`: in fp32 throughout."""
    return 1e-3 if exact else 0.05


def check_logprobs(
    sampled: Tensor, measured: Tensor, library: Tensor, rollout: Rollout, exact: bool
) -> float:
    """Stops a run whose log-probabilities are wrong; returns the largest gap.

    `sampled` and `measured` (the loss's) are held against `library`, one unpadded pass a completion
    by the model's own code, all [B, T]. `exact` (fp32 weights and arithmetic) allows `allowed_gap`
    at any token. Otherwise rounding moves single tokens, and the mean counts. Raises ValueError
    with the likely cause.
    """
    gap = torch.maximum((sampled - library).abs(), (measured - library).abs())
    mean = (gap.sum() / rollout.completion_mask.sum()).item()
    worst = gap.max().item()
    if (worst if exact else mean) <= allowed_gap(exact):
        return worst
    padded = rollout.prompt_mask[rollout.prompt_of].min(-1).values == 0
    by_row = gap.max(-1).values
    if padded.any() and not padded.all() and by_row[padded].min() > 10 * by_row[~padded].max():
        cause = "only padded prompts are off: the model ignores position_ids or the attention mask"
    else:
        cause = "all prompts are off: dropout is on, or the model's cache and its full pass differ"
    raise ValueError(
        f"the log-probabilities of the samples and of the loss differ by up to {worst:.2g} nats "
        f"a token ({mean:.2g} on average); training on them would be wrong. Likely cause: {cause}"
    )
