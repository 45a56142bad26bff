"""Sampling from any causal LM by the library's `generate`, with our random numbers.

Leaves out speed: GPT-2 has decode.py.
"""

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Rollout
from adaptiverl.rl.sampling.stop import StopStrings
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


class _StopAtStrings(StoppingCriteria):
    """Ends a row at a stop string of its completion, which begins after `start` tokens."""

    def __init__(self, stop: StopStrings, start: int):
        self.stop, self.start = stop, start

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return self.stop(input_ids[:, self.start :])


class GenerateBackend:
    """Samples by `generate`. If FSDP shards the policy, all processes stop together."""

    def __init__(self, policy: Policy, token_sampler: TokenSampler):
        self.policy, self.token_sampler = policy, token_sampler

    @torch.no_grad()
    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, prompt_of: Tensor, uniform: Tensor
    ) -> Rollout:
        """See `Backend`."""
        lm, how = self.policy.base, self.token_sampler
        draw, stopping = _DrawToken(how, uniform), StoppingCriteriaList()
        if how.stop:
            stopping.append(_StopAtStrings(how.stop, prompt_ids.shape[1]))
        # The model's own generation settings (a repetition penalty, say) would change what is
        # sampled, and `generate` reads from them whatever it is not given.
        original, lm.generation_config = lm.generation_config, GenerationConfig()
        try:
            lm.generate(
                input_ids=prompt_ids[prompt_of],
                attention_mask=prompt_mask[prompt_of],
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=stopping,
                max_new_tokens=uniform.shape[1],
                do_sample=False,
                eos_token_id=how.eos_ids.tolist(),
                pad_token_id=how.pad_id,
                use_cache=True,
                synced_gpus=self.policy.sharded,
            )
        finally:
            lm.generation_config = original
        tokens, logprobs = torch.stack(draw.tokens, 1), torch.stack(draw.logprobs, 1)
        live = how.live(tokens)
        return Rollout(
            prompt_ids,
            prompt_mask,
            prompt_of,
            tokens.where(live, how.pad_id),
            live.to(prompt_mask.dtype),
            logprobs.where(live, 0.0),
        )
