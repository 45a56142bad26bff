"""Sampling from any causal LM by the library's `generate`, with our random numbers.

Leaves out speed: GPT-2 has decode.py.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from adaptiverl.rl.rollout import Choice, Rollout


class _Chooser(LogitsProcessor):
    """Leaves `generate` one token with a finite score: the one that was chosen."""

    def __init__(self, choice: Choice, uniform: Tensor):
        self.choice, self.uniform = choice, uniform
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = (scores.float() / self.choice.temperature).t().contiguous()
        token, logprob = self.choice(logits, self.uniform[:, len(self.tokens)])
        self.tokens.append(token)
        self.logprobs.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


@torch.no_grad()
def generate(
    lm: Any,
    choice: Choice,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    prompt_of: Tensor,
    uniform: Tensor,
    *,
    synced: bool = False,
) -> Rollout:
    """As Decoder: completes prompt `prompt_of[i]` of [Q, P] from row i of `uniform` [B, T].

    `synced`: goes on until all processes are done, because they need each other's weights.
    """
    chooser = _Chooser(choice, uniform)
    # The model's own generation settings (a repetition penalty, say) would bend what is sampled,
    # and `generate` fills in from them whatever it is not told.
    usual, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        lm.generate(
            input_ids=prompt_ids[prompt_of],
            attention_mask=prompt_mask[prompt_of],
            logits_processor=LogitsProcessorList([chooser]),
            max_new_tokens=uniform.shape[1],
            do_sample=False,
            eos_token_id=choice.eos_ids.tolist(),
            pad_token_id=choice.pad_id,
            use_cache=True,
            synced_gpus=synced,
        )
    finally:
        lm.generation_config = usual
    tokens, logprobs = torch.stack(chooser.tokens, 1), torch.stack(chooser.logprobs, 1)
    ends = torch.isin(tokens, choice.eos_ids).long()
    live = ends.cumsum(-1) == ends  # its first EOS counts
    return Rollout(
        prompt_ids,
        prompt_mask,
        prompt_of,
        tokens.where(live, choice.pad_id),
        live.to(prompt_mask.dtype),
        logprobs.where(live, 0.0),
    )
