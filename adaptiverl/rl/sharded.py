"""A policy that FSDP shards over processes: how to sample from it, measure it and save it.

FSDP gathers a layer's weights when the layer is called, and frees them afterwards. accelerate does
the sharding itself.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.optim import Optimizer

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
T = TypeVar("T")


def run_gathered(policy: nn.Module, work: Callable[[], T]) -> T:
    """`work()`, which may call parts of `policy`; without gradient, and in all processes at once.

    FSDP gathers the outermost weights (embeddings, head) only in a forward pass of the policy, so
    `work` is run as one.
    """
    setattr(policy, "gathered_work", work)  # noqa: B010
    register_fsdp_forward_method(policy, "gathered_work")  # replaces it by one that gathers
    layers = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for layer in layers:  # stays gathered after its first call: sampling calls it once per token
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        return policy.gathered_work()  # type: ignore[operator]
    finally:
        for layer in layers:
            layer.reshard()
            layer.set_reshard_after_forward(True, recurse=False)
        delattr(policy, "gathered_work")


def local(weights: list[Any]) -> list[Tensor]:
    """This process's shards of `weights`."""
    return [weight.to_local() for weight in weights]


def whole_weights(policy: nn.Module) -> dict[str, Any]:
    """By parameter name, on the CPU of the main process; all processes must call it."""
    return get_model_state_dict(policy, options=WHOLE)


class ShardedOptimizer:
    """The state of `optimizer`, whose parameters are shards, saved whole by parameter name.

    All processes must call its methods together.
    """

    def __init__(self, policy: nn.Module, optimizer: Optimizer):
        self.policy, self.optimizer = policy, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.policy, self.optimizer, options=WHOLE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.policy, self.optimizer, state, options=WHOLE)
