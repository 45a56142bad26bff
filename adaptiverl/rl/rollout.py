"""Rollouts: what was sampled.

Layout of every tensor here: prompts padded on the left, completions on the right,
    [pad pad p p p | c c eos pad]      prompt [Q, P], completion [B, T].
Masks come from positions, never from `!= pad`, because GPT-2's pad is its EOS. A completion's mask
ends with its first EOS, or with the token that completes its first stop string, included.
Log-probabilities are those of softmax(logits / temperature), the distribution that is sampled;
top-k and top-p change it further, which they do not include.
"""

import copy

import torch
from torch import Tensor


class Rollout:
    """A batch of sampled completions, and optionally each token's weight in the gradient.

    Not a dataclass: FSDP casts the tensors in dataclasses and tuples that a model is called with.
    """

    def __init__(
        self,
        prompt_ids: Tensor,  # [Q, P], each prompt once
        prompt_mask: Tensor,  # [Q, P]
        prompt_of: Tensor,  # [B], the prompt of each completion
        completion_ids: Tensor,  # [B, T]
        completion_mask: Tensor,  # [B, T]
        logprobs: Tensor,  # [B, T], measured while sampling, 0 where masked
        weights: Tensor | None = None,  # [B, T], the factor of ∇ log π of each token
    ):
        self.prompt_ids, self.prompt_mask, self.prompt_of = prompt_ids, prompt_mask, prompt_of
        self.completion_ids, self.completion_mask = completion_ids, completion_mask
        self.logprobs, self.weights = logprobs, weights

    def __len__(self) -> int:
        return len(self.completion_ids)

    def with_weights(self, weights: Tensor) -> "Rollout":
        """The same completions with `weights` [B, T], the factor of each token in the gradient."""
        result = copy.copy(self)
        result.weights = weights
        return result

    def select(self, rows: Tensor) -> "Rollout":
        """The completions `rows` with their prompts, without the padding that all of them have."""
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
            None if self.weights is None else self.weights[rows, :width],
        )

    def split_rows(self, count: int) -> list[Tensor]:
        """The rows of each of `count` micro-batches; similar lengths together, to save padding."""
        if count == 1:
            return [torch.arange(len(self), device=self.prompt_of.device)]
        return list(self.completion_mask.sum(-1).argsort(stable=True).chunk(count))

    def micro_batches(self, count: int) -> list["Rollout"]:
        """All completions in `count` parts of similar length (fewer if there are fewer rows)."""
        return [self.select(rows) for rows in self.split_rows(count)]

    def tokens(self) -> list[list[int]]:
        """Each completion's ids, its EOS included, without padding."""
        lengths = self.completion_mask.sum(-1).tolist()
        return [row[:n] for row, n in zip(self.completion_ids.tolist(), lengths, strict=True)]


def uniforms(seed: int, step: int, batch_size: int, length: int, stream: int = 0) -> Tensor:
    """The random numbers of one step, [B, T] in [0, 1): the same for any number of processes.

    They follow from `seed`, `step` and `stream` alone, so a resumed run needs no generator state.
    """
    # A CPU's generator heeds the lower 32 bits of its seed alone, so the offset is in these.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step + stream * 2_654_435_769)
    return torch.rand(batch_size, length, generator=generator, dtype=torch.float64)
