"""What an online optimizer did to each tensor, for reports."""

from typing import Any

import torch
from torch import Tensor

from adaptiverl.optim.online.optimizers import Online


def dynamics(optimizer: Online) -> list[dict[str, Any]]:
    """A row for each tensor: its smoothed gradient norm, norm of its hidden state, its scale, and
    norms and means of its moments; fetched from the device at once."""
    columns = [optimizer.last["size"], optimizer.hidden.norm(dim=1), optimizer.last["scale"].exp()]
    names = ["grad_signal", "hidden_norm", "delta_scale"]
    for key, name, measure in (
        ("exp_avg", "exp_avg_norm", torch.linalg.vector_norm),
        ("momentum_buffer", "momentum_norm", torch.linalg.vector_norm),
        ("exp_avg_sq", "exp_avg_sq_mean", torch.mean),
        ("square_avg", "square_avg_mean", torch.mean),
    ):
        buffers = [optimizer.state.get(p, {}).get(key) for p in optimizer.tensors]
        if all(isinstance(b, Tensor) for b in buffers):
            columns.append(torch.stack([measure(b.float()) for b in buffers]))
            names.append(name)
    rows = torch.stack(columns, 1).tolist()
    return [
        {"tensor": i, "name": tensor} | dict(zip(names, row, strict=True))
        for i, (tensor, row) in enumerate(zip(optimizer.names, rows, strict=True))
    ]
