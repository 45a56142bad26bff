"""A policy that FSDP has spread over processes: whole for sampling and saving.

FSDP gathers a layer when it is called and lets go of it afterwards. Leaves out how it is spread,
which accelerate does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@contextmanager
def kept_whole(policy: nn.Module) -> Iterator[None]:
    """Within this, a layer stays gathered after its first call: sampling calls it once a token."""
    layers = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()
            layer.set_reshard_after_forward(True, recurse=False)


def local(weights: list[Any]) -> list[Tensor]:
    """This process's shards of `weights`."""
    return [weight.to_local() for weight in weights]


def whole_state(policy: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """State dicts of both, by parameter name, on the CPU of the main process; all must call it."""
    weights = get_model_state_dict(policy, options=WHOLE)
    return weights, get_optimizer_state_dict(policy, optimizer, options=WHOLE)


def load_optimizer(policy: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """What `whole_state` gave, in all processes."""
    set_optimizer_state_dict(policy, optimizer, state, options=WHOLE)
