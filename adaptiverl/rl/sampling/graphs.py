"""CUDA graphs: launches that are recorded once and then replayed, on whatever the buffers hold.

What is recorded is decode.py's.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of captures: cuBLAS keeps a workspace for each, 32 MiB and more on Hopper."""
    return torch.cuda.Stream(device)


class Recorder:
    """Makes graphs on `device`, all in one pool of memory: nothing in it outlives a replay."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool: Any = None  # once there is a graph

    def record(self, action: Callable[..., None], *inputs: Tensor) -> Callable[..., None]:
        """`action` as a graph, which is called with tensors of the shapes of `inputs`.

        They are copied to buffers of its own, from which the graph reads.
        """
        own = [each.clone() for each in inputs]
        graph = self._captured(functools.partial(action, *own))

        def replay(*given: Tensor) -> None:
            for buffer, each in zip(own, given, strict=True):
                buffer.copy_(each)
            graph.replay()

        return replay

    def _captured(self, action: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """`action` as a graph, after it ran once, which makes the libraries' workspaces."""
        graph = torch.cuda.CUDAGraph()
        on = torch.is_autocast_enabled("cuda")
        # Autocast's cache would stay in the graph, with the weights as they are now.
        with torch.no_grad(), torch.autocast("cuda", enabled=on, cache_enabled=False):
            side = side_stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                action()
            torch.cuda.current_stream(self.device).wait_stream(side)
            # Other threads may use the device meanwhile: rewards do.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=side, capture_error_mode="thread_local"
            ):
                action()
        self.pool = graph.pool()
        return graph
