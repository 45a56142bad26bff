"""From texts to rollouts and back: a policy with its tokenizer and sampling settings."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Rollout, sample, token_logprobs


@dataclass(frozen=True)
class Sampler:
    """Samples from `policy` and measures what was sampled, always at the same temperature."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    max_prompt: int | None = None  # tokens; longer prompts lose their beginning
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def __call__(self, prompts: list[str], uniform: Tensor) -> Rollout:
        """A completion of each prompt, from the random numbers `uniform` [B, T]."""
        batch = self.tokenizer(
            prompts,
            padding=True,
            truncation=self.max_prompt is not None,
            max_length=self.max_prompt,
            return_tensors="pt",
        ).to(self.device)
        return sample(
            self.policy,
            batch.input_ids,
            batch.attention_mask,
            uniform.to(self.device),
            eos_ids=self.eos_ids(),
            pad_id=self.tokenizer.pad_token_id,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )

    def eos_ids(self) -> Tensor:
        """Every id that ends a completion: chat models have several."""
        ids = self.policy.lm.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        return torch.tensor([*ids, self.tokenizer.eos_token_id], device=self.device)

    def decode(self, rollout: Rollout) -> list[str]:
        """The completions as text, special tokens left out."""
        return self.tokenizer.batch_decode(rollout.tokens(), skip_special_tokens=True)

    @torch.no_grad()
    def reference_logprobs(self, rollout: Rollout) -> Tensor:
        """[B, T], by the reference."""
        return token_logprobs(self.policy.reference_forward, rollout, self.temperature)[0]
