"""From texts to rollouts and back, and the choice of the backend that samples."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adaptiverl.rl.chat import Prompt, PromptError, end_of_turn, render, tokenize
from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Rollout
from adaptiverl.rl.sampling.generate import GenerateBackend
from adaptiverl.rl.sampling.static_cache import StaticCacheBackend
from adaptiverl.rl.sampling.stop import StopStrings
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


def no_tokens(text: str) -> str:
    """The message for a prompt of which the tokenizer makes no token."""
    return (
        f"the tokenizer makes no token of the prompt {text!r} (to start from nothing, write the "
        "model's beginning-of-text token)"
    )


def too_long(tokens: int, most: int) -> str:
    """The message for a conversation of so many `tokens`, of which `most` fit."""
    return (
        f"a conversation of {tokens} tokens is longer than the {most} that MAX_NEW_TOKENS leaves "
        "for a prompt, and cutting it would break the chat template: raise MAXSEQ if it is set, "
        "lower MAX_NEW_TOKENS, or leave such rows out"
    )


class Sampler:
    """Samples completions of prompts from `policy`. The caller decides on autocast and no_grad.

    `max_prompt` is in tokens: longer texts lose their beginning, longer conversations, whose
    template that would break, are refused. A completion ends with an EOS token, or with the token
    that completes one of the strings `stop`. `backend` is as in `choose_backend`.
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
        stop: Sequence[str] = (),
    ):
        self.policy, self.tokenizer, self.max_prompt = policy, tokenizer, max_prompt
        eos, pad = eos_ids(policy, tokenizer), tokenizer.pad_token_id
        self.stop = StopStrings(tokenizer, stop, policy.device) if stop else None
        self.how = TokenSampler(eos, pad, policy.temperature, top_k, top_p, self.stop)
        self.backend = choose_backend(backend, policy, self.how)

    def __call__(self, prompts: Sequence[Prompt], uniform: Tensor) -> Rollout:
        """A completion of each prompt, from the random numbers `uniform` [B, T] in [0, 1).

        Prompts are all texts or all conversations. Raises PromptError.
        """
        texts = [render(self.tokenizer, each) for each in prompts]
        distinct = dict(zip(texts, prompts, strict=True))
        number = {text: i for i, text in enumerate(distinct)}
        device = self.policy.device
        chat = not isinstance(prompts[0], str)
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if self.max_prompt is not None and not chat:
            options |= {"truncation": True, "max_length": self.max_prompt}
        batch = tokenize(self.tokenizer, list(distinct.values()), **options)
        self._check_tokens(list(number), batch.input_ids, batch.attention_mask)
        if chat and self.max_prompt and batch.input_ids.shape[1] > self.max_prompt:
            raise PromptError(too_long(batch.input_ids.shape[1], self.max_prompt))
        batch = batch.to(device)
        prompt_of = torch.tensor([number[text] for text in texts], device=device)
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

    def truncated(self, rollout: Rollout) -> Tensor:
        """[B], whether no end of text and no stop string ended the completion."""
        ends = self.how.ends(rollout.completion_ids) & rollout.completion_mask.bool()
        return ~ends.any(-1)

    def decode(self, rollout: Rollout) -> list[str]:
        """The completions as text, without special tokens and the stop strings that ended them."""
        texts = self.tokenizer.batch_decode(rollout.tokens(), skip_special_tokens=True)
        if not self.stop:
            return texts
        ends = self.stop.ends(rollout.completion_ids) & rollout.completion_mask.bool()
        ended = ends.any(-1).tolist()
        return [
            self.stop.cut(text) if end else text for text, end in zip(texts, ended, strict=True)
        ]


def eos_ids(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Every token id that ends a completion; chat models have several.

    Those of the generation config, that of the tokenizer, and that of its chat template, which
    neither may name where a base model is given a template.
    """
    ids = policy.lm.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    turn = end_of_turn(tokenizer)
    own = [tokenizer.eos_token_id] if turn is None else [tokenizer.eos_token_id, turn]
    return torch.tensor([*ids, *own], device=policy.device)
