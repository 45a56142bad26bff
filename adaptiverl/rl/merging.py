"""An adapter merged into its base, as a model that needs neither peft nor bitsandbytes."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptiverl.rl.policy import Policy


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

    lm = PeftModel.from_pretrained(base.float(), adapter).merge_and_unload()
    for name in transposed:
        linear = lm.get_submodule(name)
        conv = Conv1D(linear.out_features, linear.in_features)
        conv.weight = nn.Parameter(linear.weight.detach().t().contiguous())
        if linear.bias is not None:
            conv.bias = linear.bias
        lm.set_submodule(name, conv)
    return lm.eval()
