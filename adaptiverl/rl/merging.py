"""An adapter merged into its base, as a model that needs neither peft nor bitsandbytes."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptiverl.rl.policy import Policy


def merge(adapted: Any) -> PreTrainedModel:
    """The base of peft's model `adapted` with the adapter in its weights.

    Where one of two layers that share a weight has an adapter, each gets a weight of its own: the
    other must not change.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # seconds to import

    base = adapted.get_base_model()
    users = Counter(id(weight) for _, weight in base.named_parameters(remove_duplicate=False))
    for layer in [module for module in base.modules() if isinstance(module, BaseTunerLayer)]:
        inner = layer.get_base_layer()
        weight = getattr(inner, "weight", None)  # layers of experts have other names
        if weight is not None and users[id(weight)] > 1:
            inner.weight = nn.Parameter(weight.detach().clone())
            for config in (base.config, base.config.get_text_config()):
                config.tie_word_embeddings = False
            base.all_tied_weights_keys = {}  # or a checkpoint would leave one of them out
    return adapted.merge_and_unload()


def merged(policy: Policy, adapter: Path) -> PreTrainedModel:
    """The base of `policy` with the adapter in the folder `adapter`, which the policy has, in it.

    fp32, whatever the base was; layers in 4 or 8 bits are dequantised, to what they computed with.
    Takes the policy apart.
    """
    base = policy.lm.unload()
    quantized = bool(getattr(base, "is_quantized", False))
    # bitsandbytes keeps the weights of a Conv1D (GPT-2) as those of a Linear, transposed
    transposed = [
        name
        for name, module in base.named_modules()
        if quantized and issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)
    ]
    if quantized:
        base = base.dequantize(torch.float32)
        # Those of weights stored in 4 bits; transformers would undo them when it saves, and cannot
        base._weight_conversions = None
    from peft import PeftModel  # seconds to import

    lm = merge(PeftModel.from_pretrained(base.float(), adapter))
    for name in transposed:
        linear = lm.get_submodule(name)
        conv = Conv1D(linear.out_features, linear.in_features)
        conv.weight = nn.Parameter(linear.weight.detach().t().contiguous())
        if linear.bias is not None:
            conv.bias = linear.bias
        lm.set_submodule(name, conv)
    return lm.eval()
