"""The policy: a causal LM that measures rollouts, with its reference.

Leaves out loading (loading.py), sampling (sampling/), devices and processes (accelerate's).
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptiverl.rl.gpt2 import is_gpt2
from adaptiverl.rl.head import plain_logprobs, token_logprobs
from adaptiverl.rl.packed import predicting_states
from adaptiverl.rl.projection import keep_logits_fp32
from adaptiverl.rl.rollout import Rollout

TRAINED, REFERENCE = "default", "reference"  # names of adapters; the first is peft's


class Measured(NamedTuple):
    """What the policy's forward pass says of a rollout; [B, T] are 0 where masked."""

    logprobs: Tensor  # [B, T], with gradient unless the rollout has weights
    entropy: Tensor  # [B, T], nats, without gradient
    score: Tensor | None  # Σ weights · log π, with gradient; None if the rollout has no weights


class Policy(nn.Module):
    """A causal LM that measures rollouts, at one temperature, and its frozen reference.

    The reference is `reference`; without it, the policy with its adapter off, or with the adapter
    named "reference" instead. `sharded` means that FSDP will shard the policy: modules are then
    called as a whole, and sampling goes on until all processes are done.
    """

    lm: Any  # a PreTrainedModel or peft's PeftModel around one

    def __init__(
        self,
        lm: nn.Module,
        reference: nn.Module | None = None,
        temperature: float = 1.0,
        sharded: bool = False,
    ):
        super().__init__()
        self.lm = lm.eval()  # dropout would make the policy differ from itself
        self.temperature, self.sharded = temperature, sharded
        self._reference = (reference,)  # in a tuple: no submodule, not trained, not saved
        keep_logits_fp32(self.base)
        if reference is not None:
            keep_logits_fp32(reference)
        self.gpt2 = is_gpt2(self.base) and not sharded  # its layers are called one by one
        self.plain_head = has_plain_head(self.base)

    @property
    def has_adapter(self) -> bool:
        return bool(getattr(self.lm, "peft_config", None))

    @property
    def base(self) -> Any:
        """The PreTrainedModel; adapters are in its layers."""
        return self.lm.get_base_model() if self.has_adapter else self.lm

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, rollout: Rollout) -> Measured:
        """Measures the completions' tokens, differentiably.

        With `rollout.weights`, known before this pass, only `score` has a gradient, which is
        computed in the same pass. Without them `logprobs` has one, for any loss of them.
        """
        mask = rollout.completion_mask.bool()
        tokens, score = rollout.completion_ids[mask], None
        weights = None if rollout.weights is None else rollout.weights[mask]
        if self.plain_head:
            states, head = self._states(rollout), self.base.get_output_embeddings()
            score, logprobs, entropy = token_logprobs(
                states, head, tokens, weights, self.temperature
            )
        else:
            table = self._log_softmax(rollout)
            logprobs = table.gather(-1, tokens[:, None])[:, 0]
            entropy = -(table.detach().exp() * table.detach()).sum(-1)
            if weights is not None:
                score, logprobs = (weights * logprobs).sum(), logprobs.detach()
        zeros = entropy.new_zeros(mask.shape)
        logprobs = zeros.masked_scatter(mask, logprobs)
        return Measured(logprobs, zeros.masked_scatter(mask, entropy), score)

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> Tensor:
        """log π of the completions' tokens, [B, T], 0 where masked."""
        mask = rollout.completion_mask.bool()
        tokens = rollout.completion_ids[mask]
        if self.plain_head:
            states, head = self._states(rollout), self.base.get_output_embeddings()
            result = plain_logprobs(states, head, tokens, self.temperature)
        else:
            result = self._log_softmax(rollout).gather(-1, tokens[:, None])[:, 0]
        return result.new_zeros(mask.shape).masked_scatter(mask, result)

    @torch.no_grad()
    def distributions(self, rollout: Rollout) -> Tensor:
        """log π of the whole vocabulary at each of the completions' N unmasked tokens, [N, V]."""
        if not self.plain_head:
            return self._log_softmax(rollout)
        logits = self.base.get_output_embeddings()(self._states(rollout))
        return (logits.float() / self.temperature).log_softmax(-1)

    @torch.no_grad()
    def reference_logprobs(self, rollout: Rollout, micro_batches: int = 1) -> Tensor:
        """As `logprobs`, by the reference, in `micro_batches` passes."""
        result = torch.zeros_like(rollout.logprobs)
        for rows in rollout.split_rows(micro_batches):
            with self.as_reference():
                measured = self.logprobs(rollout.select(rows))
            result[rows, : measured.shape[1]] = measured
        return result

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within this, the policy is its reference.

        A backend that keeps CUDA graphs, used both within and without, captures them anew each
        time: two backends are faster.
        """
        (reference,) = self._reference
        if reference is not None:
            trained, self.lm = self.lm, reference
            try:
                yield
            finally:
                self.lm = trained
            return
        if not self.has_adapter:
            raise RuntimeError("this policy was loaded without a reference")
        if REFERENCE not in self.lm.peft_config:
            with self.lm.disable_adapter():
                yield
            return
        self.lm.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield
        finally:
            self.lm.set_adapter(TRAINED)

    def _states(self, rollout: Rollout) -> Tensor:
        """The hidden states [N, D] that predict the completions' N unmasked tokens."""
        if self.gpt2:
            return predicting_states(self.base.transformer, rollout)
        start, inputs = rollout.prompt_ids.shape[1], _inputs(self.base, rollout)
        states = self.base.base_model(**inputs).last_hidden_state[:, start - 1 : -1]
        return states[rollout.completion_mask.bool()]

    def _log_softmax(self, rollout: Rollout) -> Tensor:
        """[N, V] by the model's own head, for heads that do more than a projection."""
        base, length = self.base, rollout.completion_ids.shape[1]
        inputs = _inputs(base, rollout)
        if "logits_to_keep" in inspect.signature(base.forward).parameters:  # else of prompts, too
            inputs["logits_to_keep"] = length + 1
        logits = base(**inputs).logits[:, -length - 1 : -1]
        logits = logits[rollout.completion_mask.bool()]
        return (logits.float() / self.temperature).log_softmax(-1)

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Saves the weights, or the adapter alone, in the form that `from_pretrained` loads.

        `state` replaces the policy's own state dict, where that is only a shard.
        """
        if state is not None:
            state = {name.removeprefix("lm."): weight for name, weight in state.items()}
            for tied in self.base.all_tied_weights_keys:  # the same weight under a second name
                state.pop(tied, None)
        only = {"selected_adapters": [TRAINED]} if self.has_adapter else {}
        self.lm.save_pretrained(folder, state_dict=state, **only)


def _inputs(base: Any, rollout: Rollout) -> dict[str, Any]:
    """Prompts and completions as the library's models take them.

    Positions are counted over the mask, so that padding does not move a prompt's.
    """
    prompts = rollout.prompt_ids[rollout.prompt_of], rollout.prompt_mask[rollout.prompt_of]
    ids = torch.cat([prompts[0], rollout.completion_ids], 1)
    mask = torch.cat([prompts[1], rollout.completion_mask], 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


@torch.no_grad()
def has_plain_head(base: Any) -> bool:
    """Whether logits are only a projection of the last hidden states; found by computing both."""
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:  # a quantised one, or one with an adapter
        return False
    if base.base_model is base:  # Llama 4 names a part that it does not have
        return False
    ids = torch.arange(4, device=head.weight.device)[None]
    states = base.base_model(input_ids=ids).last_hidden_state
    # Narrow: a soft cap of 30 moves a logit of 0.5 by 5e-5, and one of 20 by 2.5.
    return torch.allclose(head(states), base(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
