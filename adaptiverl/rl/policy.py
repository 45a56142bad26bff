"""The policy: any causal LM with its tokenizer and reference, fully tuned or through LoRA.

Weights that are trained are fp32; fp16 and bf16 are the autocast of whoever runs the policy.
Leaves out devices and processes (accelerate's) and sampling (rollout.py's).
"""

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding and truncating on the left as prompts need."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", truncation_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def positions_of(model: str) -> int | None:
    """How many positions the model has, None if its config sets no limit; loads no weights."""
    return getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)


class Policy(nn.Module):
    """A causal LM that returns logits at the right positions, and its frozen reference.

    The reference is the policy with its adapter off, or a frozen copy, or absent.
    """

    lm: Any  # a PreTrainedModel or peft's PeftModel around one

    def __init__(self, lm: nn.Module, reference: nn.Module | None = None):
        super().__init__()
        self.lm = lm.eval()  # dropout would make the policy differ from itself
        self._reference = (reference,)  # in a tuple: no submodule, not trained, not saved
        base = self.lm.get_base_model() if self.has_adapter else self.lm
        self.takes = set(inspect.signature(base.forward).parameters)

    @property
    def has_adapter(self) -> bool:
        return bool(getattr(self.lm, "peft_config", None))

    def forward(
        self, ids: Tensor, mask: Tensor, keep: int, *, use_cache: bool = False, cache=None
    ) -> tuple[Tensor, object]:
        """Logits [B, keep, V] of the last `keep` of `ids` [B, N], and the cache.

        `mask` [B, cached + N] is 1 at real tokens. Absolute positions are counted over it, so a
        padded prompt gets the same logits as an unpadded one.
        """
        return self._logits(self.lm, ids, mask, keep, use_cache, cache)

    @torch.no_grad()
    def reference_forward(self, ids: Tensor, mask: Tensor, keep: int) -> tuple[Tensor, None]:
        """As `forward`, by the reference."""
        (reference,) = self._reference
        if reference is not None:
            return self._logits(reference, ids, mask, keep)
        if not self.has_adapter:
            raise RuntimeError("this policy was loaded without a reference")
        with self.lm.disable_adapter():
            return self._logits(self.lm, ids, mask, keep)

    def _logits(self, lm, ids, mask, keep, use_cache=False, cache=None):
        extra = {}
        if "position_ids" in self.takes:
            extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self.takes:
            extra["logits_to_keep"] = keep
        out = lm(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=use_cache, **extra
        )
        return out.logits[:, -keep:], out.past_key_values if use_cache else None

    def save(self, folder: Path) -> None:
        """Weights, or the adapter alone, in the form `from_pretrained` loads."""
        self.lm.save_pretrained(folder)


def load_policy(
    model: str,
    *,
    checkpoint: Path | None = None,
    full_tune: bool = True,
    quantize: str | None = None,
    compute_dtype: torch.dtype = torch.float32,
    reference: bool = True,
    device: torch.device | str = "cpu",
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_targets: list[str] | None = None,
) -> Policy:
    """The policy `model` (a hub id or a folder), its weights from `checkpoint` if there is one.

    `quantize` is None, "4bit" (NF4) or "8bit"; both freeze the model under a LoRA adapter.
    """
    if quantize and full_tune:
        raise ValueError("quantised weights cannot be trained: use LoRA")
    weights = str(checkpoint) if checkpoint and full_tune else model
    kwargs = {"dtype": torch.float32, "device_map": {"": device}}
    if quantize == "4bit":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    elif quantize == "8bit":
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    lm = AutoModelForCausalLM.from_pretrained(weights, **kwargs)
    if full_tune:
        if not reference:
            return Policy(lm)
        first = (
            AutoModelForCausalLM.from_pretrained(model, **kwargs)
            if checkpoint
            else copy.deepcopy(lm)
        )
        return Policy(lm, first.eval().requires_grad_(False))

    from peft import LoraConfig, PeftModel, get_peft_model  # seconds to import

    # peft 0.21 asks transformers for an attribute by its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if checkpoint:
        return Policy(PeftModel.from_pretrained(lm, checkpoint, is_trainable=True))
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_r,
        lora_alpha=lora_alpha,
        target_modules=lora_targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in lm.modules()),  # GPT-2's
    )
    return Policy(get_peft_model(lm, lora))
