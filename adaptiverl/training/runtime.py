"""The device, the processes and the precision of a run; knows no optimizer and no algorithm.

Methods that gather must be called by all processes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn


class Runtime:
    """A thin layer over accelerate's Accelerator, which is its attribute `accelerator`."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.policy: nn.Module | None = None
        self.device = accelerator.device
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        # half a second to import
        self.shards: Any = import_module("adaptiverl.rl.sharded") if self.sharded else None

    def prepare(self, policy: nn.Module, optimizer: Any) -> nn.Module:
        """The policy as several processes train it; its parameters may be sharded."""
        self.policy, _ = self.accelerator.prepare(policy, optimizer)
        return self.policy

    def gather(self, values: Tensor) -> Tensor:
        """The `values` [n, …] of all processes, joined in order, on the CPU."""
        return self.accelerator.gather(values).cpu()

    def gather_objects(self, values: list) -> list:
        return gather_object(values)

    def from_main(self, value: Any) -> Any:
        """The main process's `value`."""
        return broadcast_object_list([value])[0]

    def reduce(self, values: Tensor, how: str = "sum") -> list[float]:
        """The sum or mean over processes of `values` [n]."""
        return self.accelerator.reduce(values.to(self.device), how).tolist()

    def largest(self, number: int) -> int:
        """So that all processes act on what one of them knows."""
        return int(self.gather(torch.tensor([number], device=self.device)).max())

    def no_grad(self, work: Callable[..., Any], *arguments: Any, autocast: bool = True) -> Any:
        """work(*arguments) without gradient. DDP must not see it: it would wait for gradients."""
        with torch.no_grad(), self.accelerator.autocast() if autocast else nullcontext():
            if self.shards:
                return self.shards.run_gathered(self.policy, partial(work, *arguments))
            return work(*arguments)

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Around the pass over a micro-batch: gradients are reduced after the `last` one."""
        # FSDP would keep the gradients of the whole model on each GPU until they are reduced.
        return nullcontext() if last or self.sharded else self.accelerator.no_sync(self.policy)

    def step(self, optimizer: Any, **arguments: Any) -> None:
        """optimizer.step(**arguments), by the gradient scaler where there is one."""
        if scaler := self.accelerator.scaler:
            scaler.step(optimizer, **arguments)  # nothing, where a gradient is not finite
            scaler.update()
        else:
            optimizer.step(**arguments)
