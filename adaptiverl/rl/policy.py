"""The policy: any causal LM with its tokenizer and reference, fully tuned or through LoRA.

Weights that are trained are fp32; fp16 and bf16 are the autocast of whoever runs the policy.
Leaves out devices and processes (accelerate's) and sampling (sampler.py's).
"""

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, find_adapter_config_file

from adaptiverl.rl.gpt2 import is_gpt2, predicting_states
from adaptiverl.rl.head import keep_logits_fp32, plain_logprobs, weighted_logprobs
from adaptiverl.rl.rollout import Rollout

TRAINED, REFERENCE = "default", "reference"  # names of adapters; the first is peft's


def adapter_config(model: str) -> dict[str, Any] | None:
    """The adapter_config.json of `model`, a hub id or a folder; None if it is no adapter."""
    file = find_adapter_config_file(model)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else None


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding and truncating on the left as prompts need.

    That of an adapter's base where the adapter has none.
    """
    adapter, name = adapter_config(model), "tokenizer_config.json"
    if adapter and not cached_file(model, name, _raise_exceptions_for_missing_entries=False):
        model = adapter["base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", truncation_side="left")
    if tokenizer.eos_token is None:
        raise ValueError("its tokenizer has no end-of-text token (eos_token)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel) -> None:
    """Makes it pad with a token that the model has; raises ValueError if none ends a text.

    What pads is masked, so any token will do.
    """
    words = len(lm.get_input_embeddings().weight)
    if tokenizer.eos_token_id >= words:
        raise ValueError(
            f"its tokenizer ends texts with {tokenizer.eos_token!r}, token "
            f"{tokenizer.eos_token_id}, but the model has {words} tokens: they do not belong "
            "together"
        )
    if tokenizer.pad_token_id >= words:
        tokenizer.pad_token = tokenizer.eos_token


class Untargeted(Exception):
    """No layers are named that could get an adapter."""


class Policy(nn.Module):
    """A causal LM that measures rollouts, and its frozen reference.

    The reference is the policy with its adapter off, or with the adapter named "reference" instead,
    or a frozen copy, or absent.
    """

    lm: Any  # a PreTrainedModel or peft's PeftModel around one

    def __init__(self, lm: nn.Module, reference: nn.Module | None = None):
        super().__init__()
        self.lm = lm.eval()  # dropout would make the policy differ from itself
        self._reference = (reference,)  # in a tuple: no submodule, not trained, not saved
        keep_logits_fp32(self.base)
        if reference is not None:
            keep_logits_fp32(reference)
        self.gpt2 = is_gpt2(self.base)  # its layers are called from outside, which FSDP forbids
        self.plain_head = has_plain_head(self.base)

    @property
    def has_adapter(self) -> bool:
        return bool(getattr(self.lm, "peft_config", None))

    @property
    def base(self) -> Any:
        """The PreTrainedModel; adapters are in its layers."""
        return self.lm.get_base_model() if self.has_adapter else self.lm

    def forward(self, work: Callable[[], Any]) -> Any:
        """work(): DDP and FSDP see by this call that the weights are used.

        No tensors are passed, because FSDP would cast them to its type, random numbers included.
        """
        return work()

    def weighted_logprobs(
        self, rollout: Rollout, weights: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Σ weights · log π over the completions' tokens; log π and the entropy at each [B, T].

        Those two are detached, and 0 where masked. `weights` is [B, T], the factor of each token in
        the gradient.
        """
        mask = rollout.completion_mask.bool()
        tokens, weights = rollout.completion_ids[mask], weights[mask]
        if self.plain_head:
            states, head = self._states(self.base, rollout), self.base.get_output_embeddings()
            score, logprobs, entropy = weighted_logprobs(states, head, tokens, weights, temperature)
        else:
            table = self._log_softmax(self.base, rollout, temperature)
            logprobs = table.gather(-1, tokens[:, None])[:, 0]
            score = (weights * logprobs).sum()
            entropy = -(table.detach().exp() * table.detach()).sum(-1)
        none = entropy.new_zeros(mask.shape)
        logprobs = none.masked_scatter(mask, logprobs.detach())
        return score, logprobs, none.masked_scatter(mask, entropy)

    @torch.no_grad()
    def logprobs(self, rollout: Rollout, temperature: float = 1.0) -> Tensor:
        """log π of the completions' tokens, [B, T], 0 where masked."""
        return self._logprobs(self.base, rollout, temperature)

    @torch.no_grad()
    def distributions(self, rollout: Rollout, temperature: float = 1.0) -> Tensor:
        """log π of every word where the completions' tokens stand, [N, V], N of them unmasked."""
        if not self.plain_head:
            return self._log_softmax(self.base, rollout, temperature)
        logits = self.base.get_output_embeddings()(self._states(self.base, rollout))
        return (logits.float() / temperature).log_softmax(-1)

    @torch.no_grad()
    def reference_logprobs(self, rollout: Rollout, temperature: float = 1.0) -> Tensor:
        """As `logprobs`, by the reference."""
        (reference,) = self._reference
        if reference is not None:
            return self._logprobs(reference, rollout, temperature)
        if not self.has_adapter:
            raise RuntimeError("this policy was loaded without a reference")
        with self._at_reference():
            return self._logprobs(self.base, rollout, temperature)

    @contextmanager
    def _at_reference(self) -> Iterator[None]:
        """The model as its reference adapter makes it, or without an adapter."""
        if REFERENCE not in self.lm.peft_config:
            with self.lm.disable_adapter():
                yield
            return
        self.lm.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield
        finally:
            self.lm.set_adapter(TRAINED)

    def _logprobs(self, base: Any, rollout: Rollout, temperature: float) -> Tensor:
        mask = rollout.completion_mask.bool()
        tokens = rollout.completion_ids[mask]
        if self.plain_head:
            states = self._states(base, rollout)
            result = plain_logprobs(states, base.get_output_embeddings(), tokens, temperature)
        else:
            table = self._log_softmax(base, rollout, temperature)
            result = table.gather(-1, tokens[:, None])[:, 0]
        return result.new_zeros(mask.shape).masked_scatter(mask, result)

    def _states(self, base: Any, rollout: Rollout) -> Tensor:
        """The states [N, D] that predict the completions' tokens, N of them unmasked."""
        mask = rollout.completion_mask.bool()
        if self.gpt2:
            return predicting_states(base.transformer, rollout)[mask]
        start = rollout.prompt_ids.shape[1]
        return base.base_model(**_inputs(base, rollout)).last_hidden_state[:, start - 1 : -1][mask]

    def _log_softmax(self, base: Any, rollout: Rollout, temperature: float) -> Tensor:
        """[N, V] by the model's own head, for those that do more there than a projection."""
        inputs, length = _inputs(base, rollout), rollout.completion_ids.shape[1]
        if "logits_to_keep" in inspect.signature(base.forward).parameters:  # else of prompts, too
            inputs["logits_to_keep"] = length + 1
        logits = base(**inputs).logits[:, -length - 1 : -1]
        return (logits[rollout.completion_mask.bool()].float() / temperature).log_softmax(-1)

    @contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Within this, frozen layers in half precision or 4 bits compute in fp32, one at a time."""
        if not self.has_adapter:  # nothing is frozen
            yield
            return
        from bitsandbytes.nn import Linear4bit  # peft has imported it

        modules = list(self.base.modules())
        four_bit = [module for module in modules if isinstance(module, Linear4bit)]
        usual = [module.compute_dtype for module in four_bit]
        head = _Widened(self.base.get_output_embeddings().parameters())  # head.py reads its weight
        head.widen()
        handles = []
        for module in modules:
            own = _Widened(module.parameters(recurse=False))
            if own.narrow:
                handles.append(module.register_forward_pre_hook(own.widen))
                handles.append(module.register_forward_hook(own.restore, always_call=True))
        for module in four_bit:
            module.compute_dtype = torch.float32
        try:
            yield
        finally:
            head.restore()
            for handle in handles:
                handle.remove()
            for module, dtype in zip(four_bit, usual, strict=True):
                module.compute_dtype = dtype

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Weights, or the adapter alone, in the form `from_pretrained` loads.

        `state` replaces the policy's own state dict, where that is only a shard.
        """
        if state is not None:
            state = {name.removeprefix("lm."): weight for name, weight in state.items()}
            for tied in self.base.all_tied_weights_keys:  # the same weight under a second name
                state.pop(tied, None)
        only = {"selected_adapters": [TRAINED]} if self.has_adapter else {}
        self.lm.save_pretrained(folder, state_dict=state, **only)


class _Widened:
    """Parameters that are fp32 between `widen` and `restore`, which take what hooks are given."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        half = (torch.bfloat16, torch.float16)
        self.narrow = [(p, p.data) for p in parameters if p.dtype in half]

    def widen(self, *_: Any) -> None:
        for p, data in self.narrow:
            p.data = data.float()

    def restore(self, *_: Any) -> None:
        for p, data in self.narrow:
            p.data = data


def _inputs(base: Any, rollout: Rollout) -> dict[str, Any]:
    """Prompts and completions as the library's models take them.

    Absolute positions are counted over the mask, so a padded prompt is read like an unpadded one.
    """
    prompts = rollout.prompt_ids[rollout.prompt_of], rollout.prompt_mask[rollout.prompt_of]
    ids = torch.cat([prompts[0], rollout.completion_ids], 1)
    mask = torch.cat([prompts[1], rollout.completion_mask], 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def _keep_differentiable(lm: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for inference: that has no gradient.

    It does so in eval mode on CPUs with AVX512-BF16, and eval mode is what turns dropout off here.
    """
    from bitsandbytes.nn import Linear4bit  # seconds to import

    for module in lm.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def has_plain_head(base: Any) -> bool:
    """Whether logits are the head's projection of the last states and no more: tried, not read."""
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:  # a quantised one, or one with an adapter
        return False
    if base.base_model is base:  # Llama 4 names a part that it does not have
        return False
    ids = torch.arange(4, device=head.weight.device)[None]
    states = base.base_model(input_ids=ids).last_hidden_state
    # Narrow: a soft cap of 30 moves a logit of 0.5 by 5e-5, and one of 20 by 2.5.
    return torch.allclose(head(states), base(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def load_policy(
    model: str,
    *,
    checkpoint: Path | None = None,
    full_tune: bool = True,
    quantize: str | None = None,
    compute_dtype: torch.dtype = torch.float32,
    reference: bool = True,
    device: torch.device | str = "cpu",
    lora: dict[str, Any] | None = None,
) -> Policy:
    """The policy `model` (a hub id or a folder), its weights from `checkpoint` if there is one.

    Of an adapter, full tuning takes the base with the adapter merged into it, and LoRA goes on with
    the adapter; the reference is the adapted model either way.

    `quantize` is None, "4bit" (NF4) or "8bit"; both freeze the model under a LoRA adapter. `lora`
    are peft's: r, lora_alpha, target_modules. Raises Untargeted if these are to be others.
    """
    adapter = adapter_config(model)
    base = adapter["base_model_name_or_path"] if adapter else model
    stored = AutoConfig.from_pretrained(base).to_dict().get("quantization_config")
    if (quantize or stored) and full_tune:
        raise ValueError("quantised weights cannot be trained: use LoRA")
    # What is not trained needs no more precision than it is computed in.
    frozen = compute_dtype if not full_tune else torch.float32
    kwargs: dict[str, Any] = {"dtype": frozen, "device_map": {"": device}}
    if quantize == "4bit":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    elif quantize == "8bit":
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)

    def begun() -> Any:
        """The model as the first step finds it, but for the adapter that is trained."""
        lm = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        if not (adapter and full_tune):
            return lm
        from peft import PeftModel  # seconds to import

        return PeftModel.from_pretrained(lm, model).merge_and_unload().requires_grad_()

    if checkpoint and full_tune:
        lm = AutoModelForCausalLM.from_pretrained(checkpoint, **kwargs)
    else:
        lm = begun()
    if quantize == "4bit" or (stored and stored.get("load_in_4bit")):
        _keep_differentiable(lm)
    if not (quantize or stored):
        # A file's weights are aligned to 8 bytes, tensors to 64, and rounding may depend on that: a
        # resumed run must not differ in the last bit.
        for parameter in lm.parameters():
            parameter.data = parameter.data.clone()
    if full_tune:
        if not reference:
            return Policy(lm)
        first = begun() if checkpoint else lm
        return Policy(lm, copy.deepcopy(first).eval().requires_grad_(False))

    from peft import LoraConfig, PeftModel, get_peft_model

    # peft 0.21 asks transformers for an attribute by its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if checkpoint or adapter:
        lm = PeftModel.from_pretrained(lm, checkpoint or model, is_trainable=True)
        if adapter and reference:
            lm.load_adapter(model, REFERENCE, torch_device=str(device))
        return Policy(lm)
    turned = any(isinstance(module, Conv1D) for module in lm.modules())  # GPT-2's
    kind = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=turned, **(lora or {}))
    names = {
        name.rpartition(".")[-1]
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not lm.get_output_embeddings()
    }
    try:
        return Policy(get_peft_model(lm, kind))
    except ValueError as error:
        reason = str(error).splitlines()[0]
        if kind.target_modules is None:
            reason = f"peft has no layers in mind for a model of type {lm.config.model_type}."
        raise Untargeted(f"{reason} Name some of {', '.join(sorted(names))}") from error
