"""Triton kernels for what a sampled token does on CUDA besides its matrix products.

A token of GPT-2 124M is 250 small kernels of torch's, which take longer to start than to run. These
do the same sums, in fp32, with less than half as many. Leaves out the products, and gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2**14  # bytes of keys, and of values, that a program reads at a time
BLOCK, ROWS = 256, 32  # logits that a program sums: tokens of the vocabulary, and completions


def add_norm(
    dtype: torch.dtype, x: Tensor, delta: Tensor, norm: torch.nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """x + delta, and its layer norm in `dtype`, that of what is multiplied next; all [B, 1, D]."""
    width = x.shape[-1]
    total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, delta.dtype))
    normed = torch.empty_like(x, dtype=dtype)
    _add_norm[(x.numel() // width,)](
        x, delta, norm.weight, norm.bias, total, normed, width, norm.eps,
        BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return total, normed


@triton.jit
def _add_norm(x, delta, weight, bias, total, normed, width, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0) * width + column
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    value += tl.load(delta + at, inside, other=0.0).to(tl.float32)
    value = value.to(total.dtype.element_ty)
    tl.store(total + at, value, inside)
    value = value.to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    result = centred * scale * tl.load(weight + column, inside, other=0.0).to(tl.float32)
    result += tl.load(bias + column, inside, other=0.0).to(tl.float32)
    tl.store(normed + at, result.to(normed.dtype.element_ty), inside)


def attention(qkv: Tensor, held: Tensor, attend: Tensor, column: Tensor) -> Tensor:
    """Writes a token's key and value to `column` of the cache, and attends up to there.

    `qkv` is [n, 1, 3, H, D / H], `held` [2, B, H, S, D / H] with B ≥ n, `attend` [n, 1, 1, S] (0
    where the token attends, else −inf), `column` [1]. Returns [n, 1, D].
    """
    rows = len(qkv)
    _, _, heads, columns, size = held.shape
    out = held.new_empty(rows, 1, heads * size)  # of its type, as autocast makes it
    padded = triton.next_power_of_2(size)
    at_once = max(1, TILE // held.element_size() // padded)
    _attention[(rows, heads)](
        qkv, held[0], held[1], attend, column, out, heads, size, columns, attend.stride(0),
        size**-0.5, COLUMNS=at_once, SIZE=padded, num_warps=2,
    )  # fmt: skip
    return out


@triton.jit
def _attention(
    qkv, keys, values, attend, column, out, heads, size, columns, attend_stride, scale,
    COLUMNS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, SIZE)
    inside = dim < size
    own = qkv + row * 3 * heads * size + head * size + dim
    query = tl.load(own, inside, other=0.0).to(tl.float32) * scale
    key = tl.load(own + heads * size, inside, other=0.0).to(keys.dtype.element_ty)
    value = tl.load(own + 2 * heads * size, inside, other=0.0).to(values.dtype.element_ty)
    last = tl.load(column)
    base = (row * heads + head).to(tl.int64) * columns * size
    tl.store(keys + base + last * size + dim, key, inside)
    tl.store(values + base + last * size + dim, value, inside)

    # A softmax over blocks of columns. It begins with the token itself, which it attends to.
    largest = tl.sum(query * key.to(tl.float32), 0)
    total = tl.full((), 1.0, tl.float32)
    result = value.to(tl.float32)
    begin = tl.full((), 0, tl.int64)
    while begin < last:
        at = begin + tl.arange(0, COLUMNS)
        there = at < last
        hidden = tl.load(attend + row * attend_stride + at, there, other=float("-inf"))
        place, read = base + at[:, None] * size + dim[None], there[:, None] & inside[None]
        held_key = tl.load(keys + place, read, other=0.0, eviction_policy="evict_first")
        held_value = tl.load(values + place, read, other=0.0, eviction_policy="evict_first")
        score = tl.sum(query[None] * held_key.to(tl.float32), 1) + hidden.to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(score, 0))
        weight = tl.exp(score - new_largest)
        kept = tl.exp(largest - new_largest)
        total = total * kept + tl.sum(weight, 0)
        result = result * kept + tl.sum(weight[:, None] * held_value.to(tl.float32), 0)
        largest = new_largest
        begin += COLUMNS
    result = (result / total).to(out.dtype.element_ty)
    tl.store(out + (row * heads + head) * size + dim, result, inside)


def inverse_cdf_sample(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """As tokens.py's, but that it leaves the logits [V, n] as they are."""
    vocabulary, rows = logits.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    largest, sums = logits.new_empty(2, blocks, rows)
    token = torch.empty(rows, dtype=torch.long, device=logits.device)
    logprob = logits.new_empty(rows)
    _sums[(blocks, triton.cdiv(rows, ROWS))](
        logits, largest, sums, vocabulary, rows, BLOCK=BLOCK, ROWS=ROWS, num_warps=4
    )
    _draw[(rows,)](
        logits, uniform, uniform.stride(0), largest, sums, token, logprob, vocabulary, rows, blocks,
        BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks), num_warps=4,
    )  # fmt: skip
    return token, logprob


@triton.jit
def _sums(
    logits, largest, sums, vocabulary, rows, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Of each block of a row: its largest logit m, and Σ exp(logit − m)."""
    block, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = (at < vocabulary)[:, None] & (row < rows)[None]
    place = at[:, None].to(tl.int64) * rows + row[None]
    x = tl.load(logits + place, inside, other=float("-inf"))
    top = tl.max(x, 0)
    tl.store(largest + block * rows + row, top, row < rows)
    top = tl.where(top == float("-inf"), 0.0, top)
    tl.store(sums + block * rows + row, tl.sum(tl.exp(x - top[None]), 0), row < rows)


@triton.jit
def _first_above(cumulative, threshold, weight, index, SIZE: tl.constexpr):
    """The first index that has a weight and whose sum exceeds the threshold; else the last one.

    0 where weights are NaN.
    """
    has = weight > 0
    first = tl.min(tl.where(has & (cumulative > threshold), index, SIZE), 0)
    return tl.minimum(first, tl.max(tl.where(has, index, 0), 0))


@triton.jit
def _draw(
    logits, uniform, uniform_stride, largest, sums, token, logprob, vocabulary, rows, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    index = tl.arange(0, BLOCKS)
    tops = tl.load(largest + index * rows + row, index < blocks, other=float("-inf"))
    size = tl.load(sums + index * rows + row, index < blocks, other=0.0).to(tl.float64)
    top = tl.max(tops, 0)
    weight = size * tl.exp(tops - top).to(tl.float64)
    cumulative = tl.cumsum(weight, 0)
    total = tl.max(cumulative, 0)
    threshold = tl.load(uniform + row * uniform_stride) * total
    block = _first_above(cumulative, threshold, weight, index, BLOCKS)
    before = tl.sum(tl.where(index < block, weight, 0.0), 0)
    fraction = (threshold - before) / tl.sum(tl.where(index == block, weight, 0.0), 0)

    index = tl.arange(0, BLOCK)
    at = block * BLOCK + index
    own = logits + row
    x = tl.load(own + at.to(tl.int64) * rows, at < vocabulary, other=float("-inf"))
    weight = tl.exp(x - top).to(tl.float64)
    cumulative = tl.cumsum(weight, 0)
    threshold = fraction * tl.max(cumulative, 0)
    offset = _first_above(cumulative, threshold, weight, index, BLOCK)
    chosen = tl.minimum(block * BLOCK + offset, vocabulary - 1)
    tl.store(token + row, chosen)
    result = tl.load(own + chosen.to(tl.int64) * rows) - top - tl.log(total).to(tl.float32)
    tl.store(logprob + row, result)
