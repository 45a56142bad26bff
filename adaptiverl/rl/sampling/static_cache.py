"""The backend that samples from GPT-2 by `Decoder`, which CUDA keeps with its graphs."""

import functools
import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import Tensor

from adaptiverl.rl.policy import Policy
from adaptiverl.rl.projection import computed_in
from adaptiverl.rl.rollout import Rollout
from adaptiverl.rl.sampling.decode import Decoder
from adaptiverl.rl.sampling.tokens import TokenSampler


@functools.cache
def kernels_for(device: torch.device) -> Any:
    """kernels.py where it runs: on CUDA, with Triton and the C compiler that Triton calls."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if device.type != "cuda" or compiler is None or importlib.util.find_spec("triton") is None:
        return None
    from adaptiverl.rl.sampling import kernels  # Triton is not installed everywhere

    return kernels


class StaticCacheBackend:
    """Samples from a GPT-2 with a plain head. `static`: keep the decoder (None: on CUDA)."""

    def __init__(self, policy: Policy, token_sampler: TokenSampler, static: bool | None = None):
        self.policy, self.token_sampler = policy, token_sampler
        self.kernels = kernels_for(policy.device)
        self.static = policy.device.type == "cuda" if static is None else static
        self.kept: Decoder | None = None
        self.bound: Any = None  # what the kept one holds fast

    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, prompt_of: Tensor, uniform: Tensor
    ) -> Rollout:
        """See `Backend`."""
        decoder = self._decoder(prompt_ids.shape[1], *uniform.shape)
        return decoder(prompt_ids, prompt_mask, prompt_of, uniform)

    def _decoder(self, prompt: int, rows: int, length: int) -> Decoder:
        width, kept = prompt + length, self.kept
        bound = bound_to(self.policy) if self.static else None
        if self.static:
            width = -(-width // 64) * 64  # few different widths, so few captures
        # The last batch of an evaluation is smaller: it must not replace the decoder.
        has_room = kept and kept.rows >= rows and kept.length >= length and kept.width >= width
        if kept and has_room and bound == self.bound:
            return kept
        # One at a time: its cache, graphs and copies fill memory, during the update too. Graphs are
        # bound to the addresses of the cache, so freeing that would mean to capture them again.
        self.kept = None
        lm = self.policy.base
        decoder = Decoder(
            lm.transformer,
            lm.get_output_embeddings(),
            self.token_sampler,
            rows=rows,
            length=length,
            width=width,
            static=self.static,
            kernels=self.kernels,
        )
        if self.static:
            self.kept, self.bound = decoder, bound
        return decoder


def bound_to(policy: Policy) -> tuple[Any, ...]:
    """What a kept decoder holds fast, so that another needs another decoder.

    Its precision, the addresses of the weights, and which adapters are on and which merged. That
    weights change in place is nothing that it must know.
    """
    lm, adapters = policy.base, []
    if policy.has_adapter:
        from peft.tuners.tuners_utils import BaseTunerLayer  # seconds to import, and there already

        adapters = [
            (layer.active_adapters, tuple(layer.merged_adapters), layer.disable_adapters)
            for layer in lm.modules()
            if isinstance(layer, BaseTunerLayer)
        ]
    precision = computed_in(lm.get_output_embeddings().weight)
    return precision, [weight.data_ptr() for weight in lm.parameters()], adapters
