"""Where a decoder keeps keys and values: one row of a buffer for each slot, written in place."""

from typing import Any

from torch import Tensor

from adaptiverl.rl.gpt2 import Cache


class SlotCache(Cache):
    """A cache [2, B, H, S, D / H] that is written in place, in the first `live` rows.

    New keys and values go to `column` (a tensor on the device, so that a graph can move it), or
    without it to the last of the `width` columns that a step uses.
    """

    def __init__(self, held: Tensor, column: Tensor | None, kernels: Any = None):
        super().__init__(held)
        self.column, self.kernels = column, kernels
        self.live, self.width = held.shape[1], held.shape[3]

    def attend(self, qkv: Tensor, attend: Tensor) -> Tensor:
        if self.kernels is None:
            return super().attend(qkv, attend)
        return self.kernels.attention(qkv, self.held, attend, self.column)

    def extend(self, new: Tensor) -> Tensor:
        rows = self.held[:, : self.live]
        if self.column is None:
            rows[:, :, :, self.width - 1 : self.width] = new
        else:
            rows.index_copy_(3, self.column, new.to(rows.dtype))
        return rows[:, :, :, : self.width]


class PromptCache(Cache):
    """What reads prompts, and copies each one's keys and values to its slots as it goes."""

    def __init__(self, slots: SlotCache, prompt_of: Tensor):
        super().__init__(slots.held)
        self.prompt_of = prompt_of

    def extend(self, new: Tensor) -> Tensor:
        self.held[:, :, :, : new.shape[3]] = new.index_select(1, self.prompt_of)
        return new
