"""Computing a policy in fp32 whose frozen layers are in half precision or 4 bits."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from adaptiverl.rl.policy import Policy


@contextmanager
def in_fp32(policy: Policy) -> Iterator[None]:
    """Within this, frozen layers in half precision or 4 bits compute in fp32, one at a time."""
    if not policy.has_adapter:  # nothing is frozen
        yield
        return
    from bitsandbytes.nn import Linear4bit  # peft has imported it

    modules = list(policy.base.modules())
    four_bit = [module for module in modules if isinstance(module, Linear4bit)]
    dtypes = [module.compute_dtype for module in four_bit]
    head = _Widened(policy.base.get_output_embeddings().parameters())  # head.py reads its weight
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
        for module, dtype in zip(four_bit, dtypes, strict=True):
            module.compute_dtype = dtype


class _Widened:
    """Parameters that are fp32 between `widen` and `restore`, which serve as hooks."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        half = (torch.bfloat16, torch.float16)
        self.narrow = [(p, p.data) for p in parameters if p.dtype in half]

    def widen(self, *_: Any) -> None:
        for p, data in self.narrow:
            p.data = data.float()

    def restore(self, *_: Any) -> None:
        for p, data in self.narrow:
            p.data = data
