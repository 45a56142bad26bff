"""GPT-2's forward pass over transformers' own modules: each prompt is read once.

Sampling, the reference and training use the same function, so they compute the same policy. It
calls modules, not their weights, so adapters and quantised layers work as they are. Leaves out
dropout (it is always off), the projection to logits (head.py) and the variants of GPT-2 that
`is_gpt2` does not allow: they run by transformers' own code.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2LMHeadModel, GPT2Model, PreTrainedModel

AddNorm = Callable[[Tensor, Tensor, torch.nn.LayerNorm], tuple[Tensor, Tensor]]


class Cache:
    """One layer's keys and values [2, B, H, N, D / H], differentiable: a new tensor each time."""

    def __init__(self, held: Any = None):
        self.held = held  # a Tensor, once there is one

    def extend(self, new: Tensor) -> Tensor:
        """Adds the new tokens' keys and values; returns all that these tokens may attend to."""
        self.held = new if self.held is None else torch.cat([self.held, new], 3)
        return self.held

    def attend(self, qkv: Tensor, attend: Tensor) -> Tensor:
        """The attention [B, N, D] of new tokens, whose `qkv` are [B, N, 3, H, D / H].

        `attend` [B, 1, N, cached + N] is 0 where a token attends, else −inf.
        """
        q, kv = qkv.permute(2, 0, 3, 1, 4).split((1, 2))  # [1 or 2, B, H, N, D / H]
        q, (k, v) = q.flatten(0, 1), self.extend(kv)
        if q.requires_grad:
            q = q.clone()  # backward keeps it, and a view would keep all of qkv
        attended = scaled_dot_product_attention(q, k, v, attn_mask=attend)
        return attended.transpose(1, 2).flatten(2)

    def take(self, rows: Tensor) -> "Cache":
        """A cache of the given `rows`, which may repeat."""
        return Cache(self.held.index_select(1, rows))


def is_gpt2(lm: PreTrainedModel) -> bool:
    """Whether `hidden_states` computes what `lm` does: GPT-2 with default attention and GELU."""
    return (
        type(lm) is GPT2LMHeadModel
        and lm.config.activation_function in ("gelu_new", "gelu_pytorch_tanh")  # the same formula
        and lm.config.scale_attn_weights
        and not lm.config.scale_attn_by_inverse_layer_idx
        and not lm.config.add_cross_attention
    )


def add_norm(x: Tensor, delta: Tensor, norm: torch.nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + delta, and its layer norm."""
    x = x + delta
    return x, norm(x)


def hidden_states(
    transformer: GPT2Model,
    ids: Tensor,
    positions: Tensor,
    attend: Any,
    caches: Sequence[Cache],
    add_norm: AddNorm = add_norm,
) -> Tensor:
    """The last layer's output [B, N, D] for `ids` [B, N] at `positions` [B, N].

    `attend` [B, 1, N, cached + N] is True where a token attends; two such for `Packed` (packed.py).
    """
    rows, length = ids.shape
    heads = transformer.config.n_head
    x, delta = transformer.wte(ids), transformer.wpe(positions)
    for block, cache in zip(transformer.h, caches, strict=True):
        x, normed = add_norm(x, delta, block.ln_1)
        qkv = block.attn.c_attn(normed).view(rows, length, 3, heads, -1)
        attend = additive(attend, qkv.dtype)  # once here, not by torch in every layer
        x, normed = add_norm(x, block.attn.c_proj(cache.attend(qkv, attend)), block.ln_2)
        inner = block.mlp.c_fc(normed)
        outer = gelu(inner)
        with recompute_gelu(outer, inner):
            delta = block.mlp.c_proj(outer)
    return transformer.ln_f(x + delta)  # not rounded to what is multiplied: the head divides it


def additive(attend: Any, dtype: torch.dtype) -> Any:
    """0 where a token attends, else −inf, of each tensor that is True where it does."""
    if not isinstance(attend, Tensor):
        return [additive(each, dtype) for each in attend]
    if attend.dtype != torch.bool:
        return attend
    return torch.zeros_like(attend, dtype=dtype).masked_fill_(~attend, -torch.inf)


def recompute_gelu(outer: Tensor, inner: Tensor) -> saved_tensors_hooks:
    """Within this, backward keeps `inner` instead of `outer`, and computes its GELU again."""
    where = outer.data_ptr()  # not `outer`, which the first function would keep alive
    return saved_tensors_hooks(
        lambda x: x.shape if x.data_ptr() == where else x,
        lambda x: x if isinstance(x, Tensor) else gelu(inner).view(x),
    )


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh. Without gradient, on a CPU, computed as x σ(2z): three times as fast."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return torch.nn.functional.gelu(x, approximate="tanh")
    a = math.sqrt(8 / math.pi)  # 2z = x (a + 0.044715 a x²)
    return torch.addcmul(torch.tensor(a), x, x, value=0.044715 * a).mul_(x).sigmoid_().mul_(x)


def read_prompts(
    transformer: GPT2Model, ids: Tensor, mask: Tensor, caches: Sequence[Cache]
) -> Tensor:
    """The hidden states [Q, P, D] of left-padded prompts, whose keys and values `caches` take."""
    return hidden_states(transformer, ids, prompt_positions(mask), prompt_attend(mask), caches)


def prompt_positions(mask: Tensor) -> Tensor:
    """[Q, P], of left-padded prompts."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def prompt_attend(mask: Tensor) -> Tensor:
    """[Q, 1, P, P], where tokens of left-padded prompts attend."""
    size = mask.shape[1]
    # A padding token attends to itself: the softmax of no position would be NaN.
    causal = torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(size, dtype=torch.bool, device=mask.device)
    return ((causal & mask[:, None].bool()) | itself)[:, None]
