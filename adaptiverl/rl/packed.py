"""GPT-2 over prompts and completions at once: their tokens are one row, and padding is left out.

Only attention needs the shapes of prompts and completions. All else of a layer takes as long as
there are tokens.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Model

from adaptiverl.rl.gpt2 import Cache, hidden_states, prompt_attend, prompt_positions, read_prompts
from adaptiverl.rl.rollout import Rollout

LEFT_OUT = 0.1  # of all tokens: from this share on padding is left out (benchmarks/README.md)


class Packed(Cache):
    """Attention of prompts, and then of their completions, whose tokens are all in one row.

    `prompts` is (Q, P), `completions` is (B, T), and `prompt_of` [B]. `padding` is None where the
    row has all of their Q · P + B · T tokens. Else it is the places of the row's tokens among these
    [N], and for each place the number of its token [Q · P + B · T]: any number where there is
    padding, to which nothing attends. It holds nothing: one serves all layers.
    """

    def __init__(
        self,
        prompts: tuple[int, int],
        completions: tuple[int, int],
        prompt_of: Tensor,
        padding: tuple[Tensor, Tensor] | None,
    ):
        super().__init__()
        self.shapes, self.prompt_of, self.padding = (prompts, completions), prompt_of, padding

    def attend(self, qkv: Tensor, attend: Any) -> Tensor:
        """As `Cache`'s, with an `attend` for the prompts and one for the completions."""
        sizes, row = [rows * length for rows, length in self.shapes], qkv[0]
        if self.padding:
            row = row.index_select(0, self.padding[1])
        prompts, completions = (
            part.unflatten(0, shape)
            for part, shape in zip(row.split(sizes), self.shapes, strict=True)
        )
        cache = Cache()
        if prompts.requires_grad:
            prompts = prompts.clone()  # backward keeps its keys and values: views of all of qkv
        first = cache.attend(prompts, attend[0])
        rest = cache.take(self.prompt_of).attend(completions, attend[1])
        attended = torch.cat([first.flatten(0, 1), rest.flatten(0, 1)])
        return (attended.index_select(0, self.padding[0]) if self.padding else attended)[None]


def predicting_states(transformer: GPT2Model, rollout: Rollout) -> Tensor:
    """The hidden states [N, D] that predict the completions' N unmasked tokens."""
    prompts, mask, of = rollout.prompt_ids, rollout.prompt_mask, rollout.prompt_of
    predicted = rollout.completion_mask.bool()
    ids = rollout.completion_ids[:, :-1]  # what follows the last token is not needed
    rows, length = ids.shape
    if length == 0:
        caches = [Cache() for _ in transformer.h]
        return read_prompts(transformer, prompts, mask, caches)[of, -1:][predicted]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    seen = mask[of].bool()[:, None].expand(-1, length, -1)
    attend = torch.cat([seen, causal.expand(rows, -1, -1)], -1)  # [B, T - 1, P + T - 1]
    positions = mask[of].sum(-1, keepdim=True) + torch.arange(length, device=ids.device)
    row = torch.stack(
        [
            torch.cat([prompts.flatten(), ids.flatten()]),
            torch.cat([prompt_positions(mask).flatten(), positions.flatten()]),
        ]
    )
    # Where the state is that predicts each token: a prompt's last predicts the first
    last = (of + 1) * prompts.shape[1] - 1
    others = torch.arange(prompts.numel(), row.shape[1], device=ids.device).view(rows, length)
    at = torch.cat([last[:, None], others], 1)[predicted]

    needed = torch.cat([mask.bool().flatten(), predicted[:, 1:].flatten()])
    kept, padding = needed.nonzero()[:, 0], None
    if len(kept) <= (1 - LEFT_OUT) * len(needed):
        token = (needed.cumsum(0) - 1).clamp(min=0)
        padding, row, at = (kept, token), row.index_select(1, kept), token[at]
    packed = Packed((len(prompts), prompts.shape[1]), (rows, length), of, padding)
    states = hidden_states(
        transformer,
        row[:1],
        row[1:],
        [prompt_attend(mask), attend[:, None]],
        [packed] * len(transformer.h),
    )
    return states[0].index_select(0, at)
