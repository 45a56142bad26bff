"""AdamMini: AdamW with one second moment per tensor.

The momentum of a tensor keeps its direction; only its length is normalised. Leaves out the finer
blocks of the paper (attention heads, output neurons).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class AdamMini(Optimizer):
    """AdamW, whose second moment is the mean over the tensor (Zhang et al. 2024, Adam-mini).

    params          tensors or groups, as torch's optimizers take them
    lr              learning rate; default 1e-3
    betas           decay per step of the mean of gradients and of squared gradients, in [0, 1);
                    default (0.9, 0.999)
    eps             added to the root of the second moment; default 1e-8
    weight_decay    decoupled, times lr; default 0.01

    p ← p − lr · (m̂ / (√v̂ + eps) + weight_decay · p), where v is one number per tensor: the running
    mean of ‖g‖² / n over the tensor's n elements. It keeps half of AdamW's memory. Gradients that
    are DTensors (FSDP) count whole. Of a complex tensor g² is |g|². Raises ValueError for arguments
    out of range, and RuntimeError for sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not _is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}; it must be in [0, inf)")
        pair = isinstance(betas, list | tuple) and len(betas) == 2
        if not pair or not all(_is_number(beta) and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas!r}; they must be two numbers in [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for the state of AdamW, whose second moments are one per weight."""
        for state in state_dict["state"].values():
            if torch.is_tensor(square := state.get("exp_avg_sq")) and square.ndim:
                raise ValueError(
                    f"this is no state of AdamMini: an exp_avg_sq has the shape {[*square.shape]}, "
                    "as of AdamW, and AdamMini keeps one number per tensor. Load it into AdamW, or "
                    "begin AdamMini without a state"
                )
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, without synchronising with the device; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError(
                    "AdamMini does not support sparse gradients: use torch.optim.SparseAdam, "
                    "or an embedding with sparse=False"
                )
            if params:
                self._step(group, params, [self.state[p] or self._begin(p) for p in params])
        return loss

    def _step(self, group: dict[str, Any], params: list[Tensor], states: list[dict]) -> None:
        """One step of tensors that have gradients; _foreach_… are few launches on a GPU."""
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        steps, averages, squares = (
            [state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_lerp_(squares, [_mean_square(grad) for grad in grads], 1 - beta2)
        torch._foreach_mul_(params, 1 - lr * decay)
        sizes = zip(params, averages, *denominators(group, states), strict=True)
        for p, average, size, correction in sizes:
            p.addcdiv_(average, size, value=-lr / correction)

    def _begin(self, p: Tensor) -> dict[str, Any]:
        self.state[p] = {
            "step": torch.zeros(()),  # on the CPU: reading it waits for no device
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros((), device=p.device, dtype=p.dtype.to_real()),
        }
        return self.state[p]


def denominators(group: dict[str, Any], states: list[dict]) -> tuple[Sequence[Tensor], list[float]]:
    """√v̂ + eps, a 0-dim tensor each, and 1 − β₁ᵗ: the last step went along m over their product."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    steps = [float(state["step"]) for state in states]
    squares = [state["exp_avg_sq"] for state in states]
    roots = torch._foreach_sqrt(torch._foreach_div(squares, [1 - beta2**step for step in steps]))
    torch._foreach_add_(roots, float(group["eps"]))
    return roots, [1 - beta1**step for step in steps]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Tensor) and not isinstance(value, bool)


def _mean_square(grad: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor  # 0.6 s, unless something has imported it already

    mean = (grad.abs() if grad.is_complex() else grad).square().mean()
    return mean.full_tensor() if isinstance(mean, DTensor) else mean
