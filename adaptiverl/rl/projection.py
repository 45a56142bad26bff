"""From hidden states to fp32 logits, whatever the precision, in one buffer that is reused.

GPT-2's logits lie around −100, where bf16 numbers are 0.5 apart. The buffer is [V, tokens]: on a
CPU that makes the products and the sums along V up to twice as fast.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

FOLD = 256  # logits


def computed_in(weight: Tensor) -> torch.dtype:
    """Autocast's type where that is on, else the weight's own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def operand_dtype(weight: Tensor) -> torch.dtype:
    """The type of what is multiplied: CUDA alone multiplies half precision to fp32 results."""
    return computed_in(weight) if weight.is_cuda and torch.version.cuda else torch.float32


def fp32_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in fp32."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)


def keep_logits_fp32(lm: Any) -> None:
    """Makes the model's own code, too, project to fp32 logits, from the same operands."""
    for module in lm.get_output_embeddings().modules():  # an adapter's, too
        if type(module) is torch.nn.Linear:
            module.forward = partial(_fp32_logits, module)  # type: ignore[method-assign]


def _fp32_logits(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """nn.Linear's forward [..., D] → [..., V]."""
    dtype = operand_dtype(head.weight)
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight = hidden.to(dtype), head.weight.to(dtype)
        if dtype == torch.float32 or torch.is_grad_enabled():
            bias = None if head.bias is None else head.bias.float()
            return linear(hidden.float(), weight.float(), bias)
        logits = fp32_product(hidden.flatten(0, -2), weight.t()).unflatten(0, hidden.shape[:-1])
        return logits if head.bias is None else logits + head.bias


class Projection:
    """Logits of a few hidden states at a time, fp32, in one buffer.

    `weight` is [V, D] in the type that is multiplied, `bias` [V, 1] or None.
    """

    def __init__(self, head: torch.nn.Linear, temperature: float = 1.0):
        device = head.weight.device
        self.weight = head.weight.detach().to(operand_dtype(head.weight))
        self.bias = None if head.bias is None else head.bias.detach().float()[:, None]
        self.temperature = temperature
        self.buffer = torch.empty(0, device=device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits / temperature, [V, n], of `hidden` [n, D]; valid until the next call."""
        size = len(self.weight) * len(hidden)
        if self.buffer.numel() < size:
            self.buffer = self.buffer.new_empty(size)
        logits = self.buffer[:size].view(-1, len(hidden))
        fp32_product(self.weight, self.states(hidden).t(), out=logits)
        if self.bias is not None:
            logits += self.bias / self.temperature
        return logits

    def states(self, hidden: Tensor) -> Tensor:
        """`hidden` / temperature, in the type that is multiplied."""
        return (hidden.detach() / self.temperature).to(self.weight.dtype)


def exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits − m) in place of the logits [V, n], and m [n], a column's largest logit."""
    largest = _largest(logits)
    return logits.sub_(largest).exp_(), largest


def logprobs_(logits: Tensor, tokens: Tensor) -> Tensor:
    """log π of `tokens` [n], one for each column of `logits` [V, n], which it overwrites."""
    own = logits.gather(0, tokens[None])[0]
    relative, largest = exponentials_(logits)
    return own - (largest + relative.sum(0).log())


def _largest(logits: Tensor) -> Tensor:
    """logits.amax(0), which on a CPU is up to 20 × slower where n is no multiple of 32."""
    vocabulary, n = logits.shape
    even = vocabulary // FOLD * FOLD
    folded = logits[:even].view(FOLD, -1, n).amax(0)
    return torch.cat([folded, logits[even:]]).amax(0)
