"""Sampling from GPT-2: buffers are made once, and completions that have ended cost no more work.

A slot is a row of the buffers. When completions end, the last live slots move into the free ones,
so live slots come first. Each step computes those alone, their number rounded up to ROUND_TO. On
CUDA a step is a graph, captured for all slots, half, a quarter and an eighth of them; so is the
reading of the prompts, captured for the sizes that come. There slots move only every COMPACT_EVERY
tokens, because the host must wait for the device to count the live ones.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GPT2Model
from transformers.pytorch_utils import Conv1D

from adaptiverl.rl.gpt2 import AddNorm, add_norm, hidden_states, read_prompts
from adaptiverl.rl.projection import Projection, computed_in
from adaptiverl.rl.rollout import Rollout
from adaptiverl.rl.sampling.graphs import Recorder
from adaptiverl.rl.sampling.slots import PromptCache, SlotCache
from adaptiverl.rl.sampling.stop import NO_TOKEN
from adaptiverl.rl.sampling.tokens import TokenSampler

COMPACT_EVERY = 16  # tokens
ROUND_TO = 8  # slots; an odd number of columns makes products up to 1.6 times as slow on a CPU
PROMPT_COLUMNS = 64  # prompts in graphs are padded to a multiple of it
PROMPT_TOKENS = 2**13  # more are read without a graph: they take longer than their launches


class Decoder:
    """Buffers for up to `rows` completions of up to `length` tokens, within `width` columns.

    `static` is for CUDA: steps have the few sizes that are captured as graphs, and the decoder is
    kept from rollout to rollout. A graph sees new weights because optimizers write in place.
    Otherwise steps compute a multiple of `round_to` slots, or all of them. `kernels` is kernels.py,
    or None for torch's.
    """

    def __init__(
        self,
        transformer: GPT2Model,
        head: torch.nn.Linear,
        token_sampler: TokenSampler,
        *,
        rows: int,
        length: int,
        width: int,
        static: bool = False,
        round_to: int = ROUND_TO,
        kernels: Any = None,
    ):
        device = head.weight.device
        self.token_sampler, self.static = token_sampler, static
        self.rows, self.length, self.width = rows, length, width
        self.round_to = round_to
        self.add_norm: AddNorm = add_norm
        self.draw = kernels.inverse_cdf_sample if kernels else None
        self.projection = Projection(head, token_sampler.temperature)
        self.dtype = computed_in(head.weight)
        self.transformer = transformer
        # Quantised layers round what they are given in their own way
        if kernels and all(p.is_floating_point() for p in transformer.parameters()):
            self.add_norm = functools.partial(kernels.add_norm, self.dtype)
        self.copies: list[tuple[Tensor, Tensor]] = []  # (copy, original) of what autocast casts
        if self.projection.weight.dtype != head.weight.dtype:
            self.copies.append((self.projection.weight, head.weight))
        if self.dtype != head.weight.dtype:
            self.transformer = self._cast(transformer)

        # By slot
        self.row = torch.arange(rows, device=device)
        self.live = torch.ones(rows, dtype=torch.bool, device=device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.position = torch.zeros(rows, dtype=torch.long, device=device)
        self.uniform = torch.zeros(rows, length, dtype=torch.float64, device=device)
        self.attend = torch.zeros(rows, 1, 1, width, dtype=torch.bool, device=device)
        # By row
        self.prompt_of = torch.zeros(rows, dtype=torch.long, device=device)
        self.tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.mask = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, length, device=device)
        # Where a step writes. On the device, so that a graph can advance it.
        self.time = torch.zeros(1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)

        config = transformer.config
        shape = (2, rows, config.n_head, width, config.n_embd // config.n_head)
        column = self.column if static or kernels else None
        self.caches = [
            SlotCache(torch.zeros(shape, dtype=self.dtype, device=device), column, kernels)
            for _ in transformer.h
        ]
        self.by_slot = [self.row, self.live, self.token, self.position, self.uniform, self.attend]
        if token_sampler.stop:  # the last tokens, in which a stop string would end
            width = token_sampler.stop.width
            self.recent = torch.full((rows, width), NO_TOKEN, device=device)
            self.by_slot.append(self.recent)
        # Numbers of slots that graphs have. The first token needs no step, and may be the only one.
        self.sizes = [max(1, rows >> k) for k in range(4)] if length > 1 else []
        self.graphs: dict[int, Callable[[], None]] = {}
        self.prompt_graphs: dict[torch.Size, Callable[[Tensor, Tensor], None]] = {}  # by shape
        self.recorder = Recorder(device)
        # bitsandbytes' int8 product synchronises with the host, which a graph cannot
        synchronises = any(p.dtype == torch.int8 for p in transformer.parameters())
        if static and device.type == "cuda" and self.sizes and not synchronises:
            self._capture_steps()

    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, prompt_of: Tensor, uniform: Tensor
    ) -> Rollout:
        """See `Backend`. B, T and P + T may be smaller than `rows`, `length` and `width`."""
        rows, length = uniform.shape
        live = self._size(rows)
        with torch.inference_mode():
            columns = self._begin(prompt_ids, prompt_mask, prompt_of, uniform)
            for t in range(1, length):
                if not self.static or t % COMPACT_EVERY == 0:
                    live = self._compact(live)
                    if live == 0:
                        break
                if self.graphs:
                    self.graphs[live]()
                else:
                    self._step(live, None if self.static else columns + t)
        width = max(1, int(self.mask.sum(-1).max()))
        written = [x[:rows, :width].clone() for x in (self.tokens, self.mask, self.logprobs)]
        return Rollout(prompt_ids, prompt_mask, prompt_of, *written)

    def _begin(self, ids: Tensor, mask: Tensor, prompt_of: Tensor, uniform: Tensor) -> int:
        """Reads the prompts and draws their first tokens; how many columns the prompts have."""
        rows, length = uniform.shape
        if self.static:  # few different shapes
            size, columns = ids.shape
            rounded = -(-columns // PROMPT_COLUMNS) * PROMPT_COLUMNS
            left = max(0, min(rounded, self.width - length) - columns)
            below = max(0, self._size(size) - size)
            ids, mask = (pad(x, (left, 0, 0, below)) for x in (ids, mask))
        read: Callable[[Tensor, Tensor], None] = self._read
        if self.graphs and ids.numel() <= PROMPT_TOKENS:
            if ids.shape not in self.prompt_graphs:
                self.prompt_of.zero_()  # of another call, which may have had more prompts
                self.prompt_graphs[ids.shape] = self.recorder.record(self._read, ids, mask)
            read = self.prompt_graphs[ids.shape]
        self.uniform[:rows, :length] = uniform
        self.live.zero_()[:rows] = True  # unused slots have ended already
        self.prompt_of.zero_()[:rows] = prompt_of
        read(ids, mask)
        return ids.shape[1]

    def _read(self, ids: Tensor, mask: Tensor) -> None:
        """Reads each prompt once, copies its cache to its rows and draws their first tokens."""
        for copied, weight in self.copies:
            copied.copy_(weight)
        caches = [PromptCache(slots, self.prompt_of) for slots in self.caches]
        states = read_prompts(self.transformer, ids, mask, caches)
        columns = ids.shape[1]
        self.attend.zero_()
        self.attend[..., :columns] = mask[self.prompt_of, None, None].bool()
        torch.arange(self.rows, out=self.row)
        self.position.copy_(mask.sum(-1)[self.prompt_of])
        if self.token_sampler.stop:
            self.recent.fill_(NO_TOKEN)
        self.tokens.fill_(self.token_sampler.pad_id)
        self.mask.zero_()
        self.logprobs.zero_()
        self.time.zero_()
        self.column.fill_(columns)
        self._draw(states[self.prompt_of, -1])

    def _draw(self, states: Tensor) -> None:
        """Draws the next token of the first slots after their hidden `states` [n, D]."""
        n = len(states)
        uniform = self.uniform[:n].index_select(1, self.time)[:, 0]
        token, logprob = self.token_sampler(self.projection.logits(states), uniform, self.draw)
        at, live = (self.row[:n], self.time), self.live[:n]
        self.token[:n] = token
        self.tokens[at] = token.where(live, self.token_sampler.pad_id)
        self.mask[at] = live.long()
        self.logprobs[at] = logprob.where(live, 0.0)
        # Not by isin, which sorts where there are ten ids or more, and then waits for the device
        live &= (token[:, None] != self.token_sampler.eos_ids).all(-1)
        if stop := self.token_sampler.stop:
            recent = self.recent[:n]
            recent.copy_(torch.cat([recent[:, 1:], token[:, None]], 1))
            live &= ~stop(recent)

    def _step(self, n: int, width: int | None = None) -> None:
        """Reads the last tokens of the first `n` slots, in `width` columns; draws the next."""
        for slots in self.caches:
            slots.live, slots.width = n, width or slots.held.shape[3]
        self.attend.index_fill_(3, self.column, True)
        states = hidden_states(
            self.transformer,
            self.token[:n, None],
            self.position[:n, None],
            self.attend[:n, ..., :width],
            self.caches,
            self.add_norm,
        )
        self.column += 1
        self.position += 1
        self.time += 1
        self._draw(states[:, 0])

    def _compact(self, n: int) -> int:
        """Moves the last live of `n` slots into free ones; returns how many are still needed."""
        live = self.live[:n]
        rest = min(n, self._size(int(live.sum())))
        free, moving = (~live[:rest]).nonzero()[:, 0], rest + live[rest:].nonzero()[:, 0]
        if len(moving):
            free = free[: len(moving)]
            for buffer in self.by_slot:
                buffer[free] = buffer[moving]
            for slots in self.caches:
                slots.held[:, free] = slots.held[:, moving]
        return rest

    def _size(self, alive: int) -> int:
        """How many slots a step computes of which `alive` are needed."""
        if self.static and alive:
            return min((size for size in self.sizes if size >= alive), default=self.rows)
        return min(self.rows, -(-alive // self.round_to) * self.round_to)

    def _cast(self, transformer: GPT2Model) -> GPT2Model:
        """A copy with products in autocast's type: cast once per rollout, not once per token."""
        result = copy.deepcopy(transformer)
        for module in result.modules():
            if isinstance(module, Conv1D) and module.weight.is_floating_point():
                for weight in module.parameters():
                    weight.data = weight.data.to(self.dtype)
        self.copies += zip(result.parameters(), transformer.parameters(), strict=True)
        return result

    def _capture_steps(self) -> None:
        """Captures a step for each number of slots; later calls overwrite what that writes."""
        for n in self.sizes:  # the largest first: it makes the largest buffer of logits
            for place in (self.time, self.column, self.position):  # each step adds one
                place.zero_()
            self.graphs[n] = self.recorder.record(functools.partial(self._step, n))
