"""From texts to rollouts and back, and the choice of the backend that samples."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Rollout
from adaptiverl.rl.sampling.generate import GenerateBackend
from adaptiverl.rl.sampling.static_cache import StaticCacheBackend
from adaptiverl.rl.sampling.tokens import TokenSampler
from adaptiverl.rl.sampling.vllm import VLLMBackend


class Backend(Protocol):
    """Completes prompts, from the policy's weights as they are at each call."""

    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, prompt_of: Tensor, uniform: Tensor
    ) -> Rollout:
        """Completes prompt `prompt_of[i]` of left-padded [Q, P] from row i of `uniform` [B, T].

        Completions have up to T tokens. The same numbers give the same tokens, unless the backend
        draws its own.
        """
        ...


BACKENDS: dict[str, Callable[[Policy, TokenSampler], Backend]] = {
    "static_cache": StaticCacheBackend,  # GPT-2 with its usual head
    "generate": GenerateBackend,
}


def choose_backend(name: str, policy: Policy, token_sampler: TokenSampler) -> Backend:
    """The backend `name`: one of BACKENDS, "auto", or a vLLM server's URL.

    "auto" is the fastest that works with `policy` in this process. Raises ValueError for another
    name, and ImportError or OSError if the server cannot be used.
    """
    if name == "auto":
        name = "static_cache" if policy.gpt2 and policy.plain_head else "generate"
    if name.startswith(("http://", "https://")):
        return VLLMBackend(name, policy, token_sampler)
    if name not in BACKENDS:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)} or a URL, not {name!r}")
    if name == "static_cache" and not (policy.gpt2 and policy.plain_head):
        raise ValueError("static_cache samples from GPT-2 alone: use auto or generate")
    return BACKENDS[name](policy, token_sampler)


class PromptError(Exception):
    """A prompt that the model cannot be given: which one, and why."""


def no_tokens(text: str) -> str:
    """The message for a prompt of which the tokenizer makes no token."""
    return (
        f"the tokenizer makes no token of the prompt {text!r} (to start from nothing, write the "
        "model's beginning-of-text token)"
    )


class Sampler:
    """Samples completions of texts from `policy`. The caller decides on autocast and no_grad.

    `max_prompt` is in tokens: longer prompts lose their beginning. `backend` is as in
    `choose_backend`.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt: int | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        backend: str = "auto",
    ):
        self.policy, self.tokenizer, self.max_prompt = policy, tokenizer, max_prompt
        eos, pad = eos_ids(policy, tokenizer), tokenizer.pad_token_id
        token_sampler = TokenSampler(eos, pad, policy.temperature, top_k, top_p)
        self.backend = choose_backend(backend, policy, token_sampler)

    def __call__(self, prompts: list[str], uniform: Tensor) -> Rollout:
        """A completion of each prompt, from the random numbers `uniform` [B, T] in [0, 1).

        Raises PromptError.
        """
        number = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        device = self.policy.device
        batch = self.tokenizer(
            list(number),
            padding=True,
            truncation=self.max_prompt is not None,
            max_length=self.max_prompt,
            return_tensors="pt",
        )
        self._check_tokens(list(number), batch.input_ids, batch.attention_mask)
        batch = batch.to(device)
        prompt_of = torch.tensor([number[text] for text in prompts], device=device)
        return self.backend(batch.input_ids, batch.attention_mask, prompt_of, uniform.to(device))

    def _check_tokens(self, texts: list[str], ids: Tensor, mask: Tensor) -> None:
        """Raises PromptError, before a CUDA device would end the process at an id too large."""
        if not (lengths := mask.sum(-1)).all():
            raise PromptError(no_tokens(texts[int(lengths.argmin())]))
        size = len(self.policy.base.get_input_embeddings().weight)
        largest = (ids * mask).amax(-1)
        if (largest >= size).any():
            text, token = texts[int(largest.argmax())], int(largest.max())
            raise PromptError(
                f"the prompt {text!r} has the token {self.tokenizer.decode([token])!r} ({token}), "
                f"but the model has {size} tokens: it does not belong to this tokenizer"
            )

    def decode(self, rollout: Rollout) -> list[str]:
        """The completions as text, without special tokens."""
        return self.tokenizer.batch_decode(rollout.tokens(), skip_special_tokens=True)


def eos_ids(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Every token id that ends a completion; chat models have several."""
    ids = policy.lm.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return torch.tensor([*ids, tokenizer.eos_token_id], device=policy.device)
