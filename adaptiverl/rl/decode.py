"""Sampling from GPT-2: buffers made once, and no work for completions that have ended.

A slot is a row of the buffers. When completions end, the last live slots move into the gaps, so
the live ones come first and a step works on those alone, rounded up to ROUND. On CUDA a step is a
graph, captured for all slots, half, a quarter and an eighth of them, and replayed; gaps are closed
only every GAP tokens, because for that the host must wait for the device.
"""

import copy

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GPT2Model
from transformers.pytorch_utils import Conv1D

from adaptiverl.rl.gpt2 import Cache, hidden_states, read_prompts
from adaptiverl.rl.head import Projection, computed_in
from adaptiverl.rl.rollout import Choice, Rollout

GAP = 16  # tokens between looks at a CUDA device
ROUND = 8  # slots; products with an odd number of columns take up to 1.6 times as long on a CPU


class Slots(Cache):
    """A cache [2, B, H, S, D / H] written in place: at `column`, on the device, if that is given.

    Else at the last of the `width` columns that a step uses, with the first `live` rows.
    """

    def __init__(self, held: Tensor, column: Tensor | None):
        super().__init__(held)
        self.column, self.live, self.width = column, held.shape[1], held.shape[3]

    def extend(self, new: Tensor) -> Tensor:
        rows = self.held[:, : self.live]
        if self.column is None:
            rows[:, :, :, self.width - 1 : self.width] = new
        else:
            rows.index_copy_(3, self.column, new.to(rows.dtype))
        return rows[:, :, :, : self.width]


class Decoder:
    """Buffers for up to `rows` completions of up to `length` tokens, within `width` columns.

    `static` is how it works on CUDA, where it is kept from rollout to rollout: sizes that a graph
    can have. A graph sees new weights because optimizers write in place.
    """

    def __init__(
        self,
        transformer: GPT2Model,
        head: torch.nn.Linear,
        choice: Choice,
        *,
        rows: int,
        length: int,
        width: int,
        static: bool = False,
    ):
        device = head.weight.device
        self.choice, self.static = choice, static
        self.rows, self.length, self.width = rows, length, width
        self.projection = Projection(head, choice.temperature)
        self.dtype = computed_in(head.weight)
        self.transformer = transformer
        self.copies: list[tuple[Tensor, Tensor]] = []  # what autocast would cast, and from what
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
        self.tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.mask = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, length, device=device)
        # Where a step writes: on the device, so that a graph can move it
        self.time = torch.zeros(1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)

        config = transformer.config
        shape = (2, rows, config.n_head, width, config.n_embd // config.n_head)
        column = self.column if static else None
        self.caches = [
            Slots(torch.zeros(shape, dtype=self.dtype, device=device), column)
            for _ in transformer.h
        ]
        self.moving = [self.row, self.live, self.token, self.position, self.uniform, self.attend]
        # How many slots a graph may have; the first token takes no step, and may be the only one
        self.sizes = [max(1, rows >> k) for k in range(4)] if length > 1 else []
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # bitsandbytes' int8 product waits for the device, which a graph cannot
        waits = any(p.dtype == torch.int8 for p in transformer.parameters())
        if device.type == "cuda" and self.sizes and not waits:
            self._capture()

    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, prompt_of: Tensor, uniform: Tensor
    ) -> Rollout:
        """Completes prompt `prompt_of[i]` of left-padded [Q, P] from row i of `uniform` [B, T].

        B and T may be less than there is room for.
        """
        with torch.inference_mode():
            self._fill(prompt_ids, prompt_mask, prompt_of, uniform)
        rows, width = len(uniform), max(1, int(self.mask.sum(-1).max()))
        written = [x[:rows, :width].clone() for x in (self.tokens, self.mask, self.logprobs)]
        return Rollout(prompt_ids, prompt_mask, prompt_of, *written)

    def _fill(
        self, prompt_ids: Tensor, prompt_mask: Tensor, prompt_of: Tensor, uniform: Tensor
    ) -> None:
        live, length = self.rows, uniform.shape[1]
        self._begin(prompt_ids, prompt_mask, prompt_of, uniform)
        for t in range(1, length):
            if not self.static or t % GAP == 0:
                live = self._close_gaps(live)
                if live == 0:
                    break
            if self.graphs:
                self.graphs[live].replay()
            else:
                self._step(live, None if self.static else prompt_ids.shape[1] + t)

    def _begin(
        self, prompt_ids: Tensor, prompt_mask: Tensor, prompt_of: Tensor, uniform: Tensor
    ) -> None:
        """Reads each prompt once, hands its cache to its rows and picks their first tokens."""
        for copied, weight in self.copies:
            copied.copy_(weight)
        states, caches = read_prompts(self.transformer, prompt_ids, prompt_mask)
        columns, (rows, length) = prompt_ids.shape[1], uniform.shape
        prompt_of = pad(prompt_of, (0, self.rows - rows))  # those left over end at once
        for slots, cache in zip(self.caches, caches, strict=True):
            slots.held[:, :, :, :columns] = cache.take(prompt_of).held
        self.attend.zero_()
        self.attend[..., :columns] = prompt_mask[prompt_of, None, None].bool()
        self.row.copy_(torch.arange(len(self.row), device=self.row.device))
        self.live.copy_(self.row < rows)
        self.position.copy_(prompt_mask.sum(-1)[prompt_of])
        self.uniform[:rows, :length] = uniform
        self.tokens.fill_(self.choice.pad_id)
        self.mask.zero_()
        self.logprobs.zero_()
        self.time.zero_()
        self.column.fill_(columns)
        self._pick(states[prompt_of, -1])

    def _pick(self, states: Tensor) -> None:
        """Draws the next token of the first slots after their hidden `states` [n, D]."""
        n = len(states)
        uniform = self.uniform[:n].index_select(1, self.time)[:, 0]
        token, logprob = self.choice(self.projection.logits(states), uniform)
        at, live = (self.row[:n], self.time), self.live[:n]
        self.token[:n] = token
        self.tokens[at] = token.where(live, self.choice.pad_id)
        self.mask[at] = live.long()
        self.logprobs[at] = logprob.where(live, 0.0)
        live &= ~torch.isin(token, self.choice.eos_ids)

    def _step(self, n: int, width: int | None = None) -> None:
        """Reads the first `n` slots' tokens and draws their next, looking at `width` columns."""
        for slots in self.caches:
            slots.live, slots.width = n, width or slots.held.shape[3]
        self.attend.index_fill_(3, self.column, True)
        states = hidden_states(
            self.transformer,
            self.token[:n, None],
            self.position[:n, None],
            self.attend[:n, ..., :width],
            self.caches,
        )
        self.column += 1
        self.position += 1
        self.time += 1
        self._pick(states[:, 0])

    def _close_gaps(self, n: int) -> int:
        """Moves the last live of `n` slots into the gaps; how many slots to go on with."""
        live = self.live[:n]
        alive = int(live.sum())
        rest = min(n, -(-alive // ROUND) * ROUND)
        if self.static and alive:
            rest = min(size for size in self.sizes if size >= alive)
        gaps, moving = (~live[:rest]).nonzero()[:, 0], rest + live[rest:].nonzero()[:, 0]
        if len(moving):
            gaps = gaps[: len(moving)]
            for buffer in self.moving:
                buffer[gaps] = buffer[moving]
            for slots in self.caches:
                slots.held[:, gaps] = slots.held[:, moving]
        return rest

    def _cast(self, transformer: GPT2Model) -> GPT2Model:
        """A copy with its matrices in autocast's type: cast once a rollout, not once a token."""
        result = copy.deepcopy(transformer)
        for module in result.modules():
            if isinstance(module, Conv1D) and module.weight.is_floating_point():
                module.weight.data = module.weight.data.to(self.dtype)
        self.copies += zip(result.parameters(), transformer.parameters(), strict=True)
        return result

    def _capture(self) -> None:
        """Captures a step for each number of slots; what that writes will be overwritten."""
        device = self.row.device
        on = torch.is_autocast_enabled("cuda")
        # What autocast keeps for later would be kept in the graph, with the weights of today.
        with torch.no_grad(), torch.autocast("cuda", enabled=on, cache_enabled=False):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                self._warm_up()
            torch.cuda.current_stream(device).wait_stream(side)
            for n in self.sizes:
                graph = torch.cuda.CUDAGraph()
                # Other threads may use the device meanwhile: rewards do.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._step(n)
                self.graphs[n] = graph

    def _warm_up(self) -> None:
        """Makes the libraries' workspaces and the largest logits buffer."""
        for n in self.sizes:
            for place in (self.time, self.column, self.position):  # each step goes on by one
                place.zero_()
            self._step(n)
