"""How one token is drawn: from a uniform random number, by inverting the cumulative sum."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from adaptiverl.rl.projection import exponentials_, logprobs_
from adaptiverl.rl.sampling.stop import StopStrings

BLOCK = 256  # tokens of the vocabulary
Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TokenSampler:
    """How a token is drawn, and which tokens end a completion."""

    eos_ids: Tensor  # [E]
    pad_id: int
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    stop: StopStrings | None = None

    def ends(self, tokens: Tensor) -> Tensor:
        """[B, T], whether each of the drawn `tokens` [B, T] ends its completion."""
        ends = torch.isin(tokens, self.eos_ids)
        return ends | self.stop.ends(tokens) if self.stop else ends

    def live(self, tokens: Tensor) -> Tensor:
        """[B, T], true up to the first token of each completion that ends it, included."""
        ends = self.ends(tokens).long()
        return ends.cumsum(-1) == ends

    def __call__(
        self, logits: Tensor, uniform: Tensor, draw: Draw | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities [n] from logits [V, n] / temperature; overwrites `logits`.

        `uniform` is [n], in [0, 1). Top-k and top-p change which token is drawn, not the
        log-probability that is returned; they copy the logits. `draw` stands for
        `inverse_cdf_sample_`.
        """
        draw = draw or inverse_cdf_sample_
        filters = LogitsProcessorList()
        if self.top_k:
            filters.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            filters.append(TopPLogitsWarper(self.top_p))
        if not filters:
            return draw(logits, uniform)
        filtered = filters(None, logits.t()).t().contiguous()
        token, _ = draw(filtered, uniform)
        return token, logprobs_(logits, token)


def inverse_cdf_sample_(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token from each column of softmax(logits) [V, n], and its log-probability, both [n].

    Inverts the cumulative sum at `uniform` [n], so one random number is enough for each token.
    First finds the block of the vocabulary, then the token in it: sums over 50,000 tokens need
    float64, because float32 is off by more than a rare token's probability. Overwrites `logits`.
    """
    vocabulary, n = logits.shape
    weights, _ = exponentials_(logits)
    even = vocabulary // BLOCK * BLOCK
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
    own = weights[index.clamp(max=vocabulary - 1), column[:, None]] * (index < vocabulary)
    within = own.double().cumsum(-1)
    offset = torch.searchsorted(within, fraction * within[:, -1:], right=True)
    # NaN gives an offset beyond the vocabulary. It shows in the log-probability, which the caller
    # checks; an index out of range would end the process on CUDA.
    token = (block * BLOCK + offset.clamp(max=BLOCK - 1))[:, 0].clamp(max=vocabulary - 1)
    return token, (weights[token, column] / total[:, 0].float()).log()
