"""Sampling from any causal LM by the library's `generate`, with our random numbers.

Leaves out speed: GPT-2 has decode.py.
"""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Rollout
from adaptiverl.rl.sampling.tokens import TokenSampler


class _DrawToken(LogitsProcessor):
    """Draws each token itself, and leaves `generate` only that one with a finite score."""

    def __init__(self, token_sampler: TokenSampler, uniform: Tensor):
        self.token_sampler, self.uniform = token_sampler, uniform
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = (scores.float() / self.token_sampler.temperature).t().contiguous()
        token, logprob = self.token_sampler(logits, self.uniform[:, len(self.tokens)])
        self.tokens.append(token)
        self.logprobs.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


class GenerateBackend:
    """Samples by `generate`. If FSDP shards the policy, all processes stop together."""

    def __init__(self, policy: Policy, token_sampler: TokenSampler):
        self.policy, self.token_sampler = policy, token_sampler

    @torch.no_grad()
    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, prompt_of: Tensor, uniform: Tensor
    ) -> Rollout:
        """See `Backend`."""
        lm, eos, pad = self.policy.base, self.token_sampler.eos_ids, self.token_sampler.pad_id
        draw = _DrawToken(self.token_sampler, uniform)
        # The model's own generation settings (a repetition penalty, say) would change what is
        # sampled, and `generate` reads from them whatever it is not given.
        original, lm.generation_config = lm.generation_config, GenerationConfig()
        try:
            lm.generate(
                input_ids=prompt_ids[prompt_of],
                attention_mask=prompt_mask[prompt_of],
                logits_processor=LogitsProcessorList([draw]),
                max_new_tokens=uniform.shape[1],
                do_sample=False,
                eos_token_id=eos.tolist(),
                pad_token_id=pad,
                use_cache=True,
                synced_gpus=self.policy.sharded,
            )
        finally:
            lm.generation_config = original
        tokens, logprobs = torch.stack(draw.tokens, 1), torch.stack(draw.logprobs, 1)
        ends = torch.isin(tokens, eos).long()
        live = ends.cumsum(-1) == ends  # up to the first EOS, included
        return Rollout(
            prompt_ids,
            prompt_mask,
            prompt_of,
            tokens.where(live, pad),
            live.to(prompt_mask.dtype),
            logprobs.where(live, 0.0),
        )
