"""From texts to rollouts and back: a policy with its tokenizer and sampling settings."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adaptiverl.rl.decode import Decoder
from adaptiverl.rl.generate import generate
from adaptiverl.rl.policy import Policy
from adaptiverl.rl.rollout import Choice, Rollout, check_logprobs
from adaptiverl.rl.vllm import Server


def no_tokens(text: str) -> str:
    """What is wrong with such a prompt."""
    return (
        f"the tokenizer makes no token of the prompt {text!r} (to start from nothing, write the "
        "model's beginning-of-text token)"
    )


class Unreadable(Exception):
    """A prompt that a model cannot be given: which, and why."""


@dataclass(frozen=True)
class Sampler:
    """Samples from `policy` and measures what was sampled, always at the same temperature.

    Whoever calls it decides on autocast.
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    max_prompt: int | None = None  # tokens; longer prompts lose their beginning
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    server: Server | None = None  # that samples instead of this process
    synced: bool = False  # whether other processes take part in each forward pass (FSDP)
    kept: list[Decoder] = field(default_factory=list)  # CUDA's, with its graphs, if any

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    @property
    def static(self) -> bool:
        """Whether a decoder is kept from rollout to rollout."""
        return self.device.type == "cuda"

    def __call__(self, prompts: list[str], uniform: Tensor) -> Rollout:
        """A completion of each prompt, from the random numbers `uniform` [B, T].

        Raises Unreadable.
        """
        number = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        batch = self.tokenizer(
            list(number),
            padding=True,
            truncation=self.max_prompt is not None,
            max_length=self.max_prompt,
            return_tensors="pt",
        )
        self._refuse(list(number), batch.input_ids, batch.attention_mask)
        batch = batch.to(self.device)
        prompt_of = torch.tensor([number[text] for text in prompts], device=self.device)
        inputs = batch.input_ids, batch.attention_mask, prompt_of, uniform.to(self.device)
        if self.server:
            return self.server(self._choice(), *inputs)
        if self.policy.gpt2 and self.policy.plain_head:
            return self._decoder(batch.input_ids.shape[1], *uniform.shape)(*inputs)
        return generate(self.policy.base, self._choice(), *inputs, synced=self.synced)

    def _refuse(self, texts: list[str], ids: Tensor, mask: Tensor) -> None:
        """Before the device sees them: on CUDA an id that is too large ends the process."""
        if not (lengths := mask.sum(-1)).all():
            raise Unreadable(no_tokens(texts[int(lengths.argmin())]))
        words = len(self.policy.base.get_input_embeddings().weight)
        largest = (ids * mask).amax(-1)
        if (largest >= words).any():
            text, token = texts[int(largest.argmax())], int(largest.max())
            raise Unreadable(
                f"the prompt {text!r} has the token {self.tokenizer.decode([token])!r} ({token}), "
                f"but the model has {words} tokens: it does not belong to this tokenizer"
            )

    def _decoder(self, prompt: int, rows: int, length: int) -> Decoder:
        lm, width = self.policy.base, prompt + length
        if self.static:
            width = -(-width // 64) * 64  # few widths, so few captures
        for kept in self.kept:  # a last part of an evaluation is smaller
            if kept.rows >= rows and kept.length >= length and kept.width >= width:
                return kept
        # One at a time: its cache, graphs and copies fill memory, during the update too. A graph is
        # bound to the addresses of its cache, so letting go of that means capturing anew.
        self.kept.clear()
        decoder = Decoder(
            lm.transformer,
            lm.get_output_embeddings(),
            self._choice(),
            rows=rows,
            length=length,
            width=width,
            static=self.static,
        )
        if self.static:
            self.kept.append(decoder)
        return decoder

    def _choice(self) -> Choice:
        return Choice(
            self.eos_ids(), self.tokenizer.pad_token_id, self.temperature, self.top_k, self.top_p
        )

    def eos_ids(self) -> Tensor:
        """Every id that ends a completion: chat models have several."""
        ids = self.policy.lm.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        return torch.tensor([*ids, self.tokenizer.eos_token_id], device=self.device)

    def decode(self, rollout: Rollout) -> list[str]:
        """The completions as text, special tokens left out."""
        return self.tokenizer.batch_decode(rollout.tokens(), skip_special_tokens=True)

    def weighted_logprobs(self, part: Rollout, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Σ weights · log π, to be differentiated; log π and the entropy at each token [B, T]."""
        return self.policy.weighted_logprobs(part, weights, self.temperature)

    def reference_logprobs(self, rollout: Rollout, pieces: int = 1) -> Tensor:
        """[B, T], by the reference, in `pieces` passes."""
        result = torch.zeros_like(rollout.logprobs)
        for rows in rollout.pieces(pieces):
            measured = self.policy.reference_logprobs(rollout.part(rows), self.temperature)
            result[rows, : measured.shape[1]] = measured
        return result

    @torch.no_grad()
    def check(self, rollout: Rollout, exact: bool) -> float:
        """Holds sampling and the loss against the library's own forward pass (check_logprobs)."""
        library = torch.zeros_like(rollout.logprobs)
        for row, completion in enumerate(rollout.tokens()):
            prompt = rollout.prompt_of[row]
            ids = rollout.prompt_ids[prompt][rollout.prompt_mask[prompt].bool()]
            tokens = torch.tensor(completion, device=self.device)
            # Not rounded by autocast: this is what rounding is measured against.
            with torch.autocast(self.device.type, enabled=False):
                logits = self.policy.lm(input_ids=torch.cat([ids, tokens])[None]).logits
            table = (logits[0, len(ids) - 1 : -1].float() / self.temperature).log_softmax(-1)
            library[row, : len(tokens)] = table.gather(-1, tokens[:, None])[:, 0]
        measured = self.policy.logprobs(rollout, self.temperature)
        return check_logprobs(rollout.logprobs, measured, library, rollout, exact)
