"""Loading a policy: from the hub, a folder or an adapter; fully tuned or through LoRA; quantised.

Weights that are trained are fp32. fp16 and bf16 are the autocast of whoever runs the policy.
"""

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, find_adapter_config_file

from adaptiverl.rl.merging import merge
from adaptiverl.rl.policy import REFERENCE, Policy

MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}  # as peft lists them


def adapter_config(model: str) -> dict[str, Any] | None:
    """The adapter_config.json of `model`, a hub id or a folder; None if it is no adapter."""
    file = find_adapter_config_file(model)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else None


def refuse_other_kinds(config: PretrainedConfig) -> None:
    """Raises ValueError unless the model of `config` is a language model of a decoder alone.

    One that is loaded as such and yet looks ahead, as BERT, is found by check.py.
    """
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        name = (config.architectures or [config.model_type])[0]
        raise ValueError(
            f"it is not a decoder-only causal language model ({name}): name one, as GPT-2, Llama "
            "and Qwen are"
        )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which pads and truncates on the left, as prompts need it.

    An adapter without a tokenizer has that of its base.
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
    """Makes the tokenizer pad with a token of the model; padding is masked, so any will do.

    Raises ValueError if the token that ends texts is not one of the model's.
    """
    size = len(lm.get_input_embeddings().weight)
    if tokenizer.eos_token_id >= size:
        raise ValueError(
            f"its tokenizer ends texts with {tokenizer.eos_token!r}, token "
            f"{tokenizer.eos_token_id}, but the model has {size} tokens: they do not belong "
            "together"
        )
    if tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.eos_token


class LoraTargetsError(Exception):
    """The layers that should get an adapter are not named, or not in the model."""


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
    temperature: float = 1.0,
    sharded: bool = False,
) -> Policy:
    """The policy `model` (a hub id or a folder), its weights from `checkpoint` if there is one.

    If `model` is an adapter, full tuning takes the base with the adapter merged into it, and LoRA
    goes on with the adapter. The reference is the adapted model either way.

    `quantize` is None, "4bit" (NF4) or "8bit"; both freeze the model under a LoRA adapter. `lora`
    are peft's arguments: r, lora_alpha, target_modules. `temperature` and `sharded` are Policy's.
    Raises LoraTargetsError if the model has not the layers that `lora` names, and ValueError if its
    files lack weights.
    """
    adapter = adapter_config(model)
    base = adapter["base_model_name_or_path"] if adapter else model
    stored = AutoConfig.from_pretrained(base).to_dict().get("quantization_config")
    if (quantize or stored) and full_tune:
        raise ValueError("quantised weights cannot be trained: use LoRA")
    # Weights that are not trained need no more precision than the computation.
    frozen = compute_dtype if not full_tune else torch.float32
    kwargs: dict[str, Any] = {"dtype": frozen, "device_map": {"": device}}
    if quantize == "4bit":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    elif quantize == "8bit":
        # Or bitsandbytes would say at each product that it rounds what it multiplies
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)

    def first_model() -> Any:
        """The model before the first step, without the adapter that is trained."""
        lm = _whole(base, **kwargs)
        if not (adapter and full_tune):
            return lm
        return merge(_peft().PeftModel.from_pretrained(lm, model)).requires_grad_()

    lm = _whole(str(checkpoint), **kwargs) if checkpoint and full_tune else first_model()
    if quantize == "4bit" or (stored and stored.get("load_in_4bit")):
        _keep_differentiable(lm)
    if not (quantize or stored):
        # Weights from a file are aligned to 8 bytes, other tensors to 64, and rounding may depend
        # on that: a resumed run must not differ in the last bit.
        for parameter in lm.parameters():
            parameter.data = parameter.data.clone()
    of_policy: dict[str, Any] = {"temperature": temperature, "sharded": sharded}
    if full_tune:
        if not reference:
            return Policy(lm, **of_policy)
        first = first_model() if checkpoint else lm
        return Policy(lm, copy.deepcopy(first).eval().requires_grad_(False), **of_policy)

    peft = _peft()
    if checkpoint or adapter:
        lm = peft.PeftModel.from_pretrained(lm, checkpoint or model, is_trainable=True)
        if adapter and reference:
            lm.load_adapter(model, REFERENCE, torch_device=str(device))
        return Policy(lm, **of_policy)
    transposed = any(isinstance(module, Conv1D) for module in lm.modules())  # GPT-2's
    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=transposed, **(lora or {}))
    kind, targets = lm.config.model_type, (lora or {}).get("target_modules")
    names = {
        name.rpartition(".")[-1]
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not lm.get_output_embeddings()
    }
    if kind in MAMBA:
        names -= {"out_proj"}  # peft refuses it: Mamba's kernels read its weight themselves
    hint = f"Name some of {', '.join(sorted(names))}"
    if isinstance(targets, list):  # peft is content with one that it finds
        found = [f".{name}" for name, _ in lm.named_modules()]
        lost = [target for target in targets if not any(x.endswith(f".{target}") for x in found)]
        if lost:
            raise LoraTargetsError(f"the model has no module {', '.join(lost)}. {hint}")
    try:
        return Policy(peft.get_peft_model(lm, config), **of_policy)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        if not targets:  # config's own is an empty set for some
            reason = f"peft has no layers in mind for a model of type {kind}."
        raise LoraTargetsError(f"{reason} {hint}") from error


def _peft() -> Any:
    import peft  # seconds

    # peft 0.21 asks transformers for an attribute by its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    return peft


def _whole(model: str, **kwargs: Any) -> Any:
    """`model` with all of its weights: transformers fills those that its files lack at random.

    As rewards/whole.py does for rewards, which this package does not know.
    """
    lm, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True, **kwargs)
    if lost := sorted(info["missing_keys"]):
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise ValueError(
            f"its files lack weights, which would be random: {names}. Name a model that was "
            "trained to write, with its output layer"
        )
    return lm


def _keep_differentiable(lm: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for inference: that has no gradient.

    It does so in eval mode on CPUs with AVX512-BF16, and eval mode is what turns dropout off here.
    """
    from bitsandbytes.nn import Linear4bit  # seconds to import

    for module in lm.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
