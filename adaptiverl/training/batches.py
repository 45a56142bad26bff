"""The prompts of each step, and the random numbers that complete them."""

from datasets import Dataset
from torch import Tensor

from adaptiverl.rl.chat import given_prompt
from adaptiverl.rl.data import indices_at
from adaptiverl.rl.rollout import uniforms
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.state import Progress

Batch = dict[str, list]  # column → one value per completion


class Batches:
    """What a step samples, a function of SEED, the step and the number of rollbacks alone.

    `rows` are this process's among the step's completions.
    """

    def __init__(self, c: RunConfig, prompts: Dataset, rows: slice, progress: Progress):
        self.config, self.prompts, self.rows, self.progress = c, prompts, rows, progress

    def at(self, step: int) -> Batch:
        """Each prompt NUM_GENERATIONS times, side by side; with all columns of the file."""
        c = self.config
        count = c.BATCH_SIZE // c.NUM_GENERATIONS
        numbers = indices_at(step - 1, count, len(self.prompts), c.SEED)
        numbers = [number for number in numbers for _ in range(c.NUM_GENERATIONS)]
        return columns(c, self.prompts, numbers[self.rows])

    def uniforms(self, step: int) -> Tensor:
        """The random numbers [B, T] of the step's completions, T = MAX_NEW_TOKENS."""
        c, stream = self.config, self.progress.rollbacks
        return uniforms(c.SEED, step, c.BATCH_SIZE, c.MAX_NEW_TOKENS, stream)[self.rows]


def columns(c: RunConfig, prompts: Dataset, numbers: list[int]) -> Batch:
    """The rows `numbers` of `prompts`; `prompt` is what the model is given of PROMPT_COLUMN."""
    found = prompts[numbers]
    return found | {"prompt": [given_prompt(each, c.SYSTEM) for each in found[c.PROMPT_COLUMN]]}
