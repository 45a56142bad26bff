"""Rewards in a run: begun early, gathered from all processes, and their metrics.

A reward that raises, or a judge that misses too much, pauses the run in every process. How scores
become one number is rewards/composite.py's.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

import rewards as package
from adaptiverl.files.process import Paused, WaitEnded
from adaptiverl.rl.chat import completion_of
from adaptiverl.rl.rollout import Rollout
from adaptiverl.training.batches import Batch
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.metrics import Metrics
from adaptiverl.training.runtime import Runtime
from rewards import CompositeReward, FatalJudgeError, HumanReward, Interrupted, Reward
from rewards.calling import RAISED_BY

# Names that rewards are called with; a column of that name is not passed on.
RESERVED = {
    "prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state",
    "log_metric", "log_extra",
}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """Raw scores of the completions of all processes, [B, R]; NaN where one is missing."""

    trained: Tensor
    held_out: Tensor


# Where the calls are that lead to a reward
CALLERS = (
    __file__,
    *(
        str(Path(package.__file__).with_name(f"{name}.py"))
        for name in ("composite", "calling", "scores", "function")
    ),
    *(library.__path__[0] + os.sep for library in (asyncio, futures)),
)
PendingScores = Callable[[], Scores]


class Scoring:
    """The rewards that are trained on (`rewards`) and those that are only logged (`held_out`)."""

    def __init__(
        self,
        c: RunConfig,
        runtime: Runtime,
        rewards: CompositeReward,
        held_out: CompositeReward,
        last_step: int,
    ):
        self.config, self.runtime, self.last_step = c, runtime, last_step
        self.rewards, self.held_out = rewards, held_out
        self.console = sys.stdout, sys.stderr

    def begin(
        self, batch: Batch, rollout: Rollout, completions: list[str], step: int
    ) -> PendingScores:
        """Starts to score this process's completions; `wait` gives the scores.

        Completions of conversations are handed to rewards as TRL does, as lists of one message.
        """
        columns: dict[str, Any] = {k: v for k, v in batch.items() if k not in RESERVED}
        columns |= {
            "completion_ids": rollout.tokens(),
            # as TRL's trainers pass it, without importing transformers' trainer and peft for it
            "trainer_state": SimpleNamespace(global_step=step, max_steps=self.last_step),
        }
        prompts = batch["prompt"]
        handed = [completion_of(*pair) for pair in zip(prompts, completions, strict=True)]
        try:
            with own_settings(self.console):
                trained, held_out = (
                    rewards.begin(prompts, handed, **columns)
                    for rewards in (self.rewards, self.held_out)
                )
        except Exception as error:
            failure = error  # raised in `wait`, where all processes hear of it

            def fail() -> NoReturn:
                raise failure

            return fail
        return lambda: Scores(trained(), held_out())

    def wait(self, *pending: PendingScores, pairs: bool = True) -> Scores:
        """The scores of the completions of all processes, of one batch after the other.

        Without `pairs` each prompt has one completion, and a PAIRWISE judge may miss them all.
        Raises Paused in all processes.
        """
        own: list[Scores] = []
        failure: Paused | None = None
        try:
            with own_settings(self.console):
                own = [scores() for scores in pending]
        except Interrupted as stopped:
            failure = WaitEnded(str(stopped))
        except Exception as error:
            name = getattr(error, "__notes__", ["a reward"])[0].removeprefix(RAISED_BY)
            if frames := _own_frames(error):
                logging.error("%s failed", name, exc_info=(type(error), error, frames))
            failure = Paused(f"{name} failed ({type(error).__name__}: {error})")
        gathered = self.runtime.gather_objects([(own, failure)])
        if failures := [failure for _, failure in gathered if failure]:
            raise failures[0]
        parts = [scores for scores_of_one, _ in gathered for scores in scores_of_one]
        scores = Scores(
            torch.cat([part.trained for part in parts]),
            torch.cat([part.held_out for part in parts]),
        )
        for reward, column in zip(self.rewards.rewards.values(), scores.trained.T, strict=True):
            if isinstance(reward, Reward) and (pairs or not reward.compares):
                missing = int(column.isnan().sum()) / len(column)
                if why := reward.why_pause(missing):
                    raise Paused(why)
        return scores

    def metrics(self, scores: Scores, prefix: str = "") -> Metrics:
        """Each reward's mean over what is not missing, the share that is, and what it reported."""
        held_out = self.held_out.report(scores.held_out)
        result = self.rewards.report(scores.trained)
        result |= {f"held_out/{name}": value for name, value in held_out.items()}
        return {prefix + name: value for name, value in result.items()}

    def lost_labels(self) -> list[str]:
        """What a run that goes on has lost of people's labels, in words."""
        every = [*self.rewards.rewards.values(), *self.held_out.rewards.values()]
        said = [reward.lost_labels() for reward in every if isinstance(reward, HumanReward)]
        return [each for each in said if each]

    def interrupt(self) -> None:
        """Ends the waiting for people and judges, so that a signal is heeded at once."""
        for rewards in (self.rewards, self.held_out):
            rewards.interrupt()

    def close(self) -> None:
        """Gives back what rewards hold: a terminal, a port."""
        for rewards in (self.rewards, self.held_out):
            rewards.close()


@contextmanager
def own_settings(console: tuple[Any, Any] | None = None) -> Iterator[None]:
    """Undoes what a reward, or its module, sets: gradients off, another dtype, other streams.

    `console` is what stdout and stderr are afterwards; None for what they are now.
    """
    console = console or (sys.stdout, sys.stderr)
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        sys.stdout, sys.stderr = console


def _own_frames(error: Exception) -> TracebackType | None:
    """What the reward did itself: not the calls that led to it, ours and those of threads.

    None where the error says it all: of a judge that refuses, of a result that is no score.
    """
    frames = None if isinstance(error, FatalJudgeError) else error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename.startswith(CALLERS):
        frames = frames.tb_next
    return frames


def columns_of(scores: Tensor, names: Sequence[str]) -> dict[str, list[float | None]]:
    """By the name of each reward, None where a score is missing: as samples.jsonl has it."""
    return {
        name: [None if value != value else value for value in column.tolist()]
        for name, column in zip(names, scores.unbind(1), strict=True)
    }
