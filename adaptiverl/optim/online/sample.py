"""A few weights of every tensor, as rows of one matrix: the same cost however large a model is."""

from collections.abc import Sequence

import torch
from torch import Tensor

EACH, ALL = 1024, 150_000  # weights that a tensor, and all together, are looked at by
BLOCKS = 16  # of neighbours, evenly spread over the tensor


class Sample:
    """Made for `tensors`; then called with as many of the same shapes (gradients, weights)."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.device = tensors[0].device
        width = max(min(EACH, ALL // len(tensors)) // BLOCKS, 1)
        self.size = BLOCKS * width
        # Blocks, not single weights: of these a cold cache would fetch each one's neighbours too.
        self.spread = [
            ((BLOCKS, width), (p.numel() // BLOCKS, 1))
            if p.numel() >= self.size
            else ((1, p.numel()), (0, 1))
            for p in tensors
        ]

    def __call__(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """[T, size]; zeros where a tensor is None, or has fewer."""
        rows = torch.zeros(len(tensors), self.size, device=self.device)
        views, places = [], []
        for row, tensor, (shape, stride) in zip(rows.unbind(), tensors, self.spread, strict=True):
            if tensor is not None:
                whole = tensor if tensor.is_contiguous() else tensor.contiguous()
                views.append(whole.as_strided(shape, stride))
                places.append(row.as_strided(shape, (shape[1], 1), row.storage_offset()))
        if views:
            torch._foreach_copy_(places, views)
        return rows
