"""Rewards in a run: begun early, gathered from all processes, and what is said of them.

A reward that raises, or a judge that misses too much, pauses the run in every process. How scores
become one number is rewards/composite.py's.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

from accelerate.utils import gather_object

from adaptiverl import setup
from adaptiverl.rl.rollout import Rollout
from adaptiverl.run.config import Config
from adaptiverl.run.process import Paused
from adaptiverl.run.reward_config import JudgeReward
from rewards import composite
from rewards.composite import CompositeReward, Scores
from rewards.desk import Interrupted
from rewards.judge import Refused

# Where the calls are that lead to a reward
CALLERS = (
    __file__,
    *(str(Path(composite.__file__).with_name(name)) for name in ("composite.py", "scores.py")),
    *(package.__path__[0] + os.sep for package in (asyncio, futures)),
)
Batch = dict[str, list]  # column → one value a completion
Begun = Callable[[], tuple[Scores, Scores]]


class Scoring:
    """What is trained on (`rewards`) and what is only watched (`held_out`)."""

    def __init__(self, config: Config, rewards: CompositeReward, held_out: CompositeReward):
        self.config, self.rewards, self.held_out = config, rewards, held_out

    def begin(
        self, batch: Batch, rollout: Rollout, completions: list[str], step: int, last_step: int
    ) -> Begun:
        """Starts to score this process's completions; `scores` waits for what was started."""
        columns: dict[str, Any] = {k: v for k, v in batch.items() if k not in setup.RESERVED}
        columns |= {
            "completion_ids": rollout.tokens(),
            # as TRL's trainers pass it, without importing transformers' trainer and peft for it
            "trainer_state": SimpleNamespace(global_step=step, max_steps=last_step),
        }
        try:
            begun = [
                rewards.begin(batch["prompt"], completions, **columns)
                for rewards in (self.rewards, self.held_out)
            ]
        except Exception as error:
            return partial(_raise, error)  # where all processes hear of it
        return lambda: (begun[0](), begun[1]())

    def scores(self, *begun: Begun, pairs: bool = True) -> tuple[Scores, Scores]:
        """What each reward says of the completions of all processes; and those held out.

        Of several that were begun, one after the other. Without `pairs` each prompt has one
        completion, and a PAIRWISE judge may miss them all. Raises Paused in all processes.
        """
        own: list[tuple[Scores, Scores]] = []
        failure = None
        try:
            own = [one() for one in begun]
        except Interrupted as stopped:
            failure = str(stopped)
        except Exception as error:
            name = getattr(error, "__notes__", ["a reward"])[0]
            if frames := _own_frames(error):
                logging.error("%s failed", name, exc_info=(type(error), error, frames))
            failure = f"{name} failed ({type(error).__name__}: {error})"
        parts = gather_object([(own, failure)])
        if failures := [failure for _, failure in parts if failure]:
            raise Paused(failures[0])
        all_of_them = [pair for pairs, _ in parts for pair in pairs]
        scores, held_out = (_joined([pair[k] for pair in all_of_them]) for k in (0, 1))
        for spec in self.config.REWARDS:
            if isinstance(spec, JudgeReward) and (pairs or not spec.PAIRWISE):
                column = scores[spec.name]
                missing = column.count(None) / len(column)
                if missing > spec.MAX_MISSING:
                    why = getattr(self.rewards.rewards[spec.name], "trouble", "") or "unknown here"
                    raise Paused(
                        f"{missing:.0%} of the judgements of {spec.name!r} are missing, more than "
                        f"its MAX_MISSING of {spec.MAX_MISSING:.0%}; the last: {why}"
                    )
        return scores, held_out

    def said(self, scores: Scores, held_out: Scores, prefix: str = "") -> dict[str, Any]:
        """Each reward's mean over what is not missing, the share that is, and what it reported."""
        result: dict[str, Any] = {}
        for rewards, columns, before in (
            (self.rewards, scores, prefix),
            (self.held_out, held_out, f"{prefix}held_out/"),
        ):
            for name, column in columns.items():
                known = [score for score in column if score is not None]
                result[f"{before}rewards/{name}/mean"] = sum(known) / len(known) if known else None
                if len(known) < len(column):
                    result[f"{before}rewards/{name}/missing"] = 1 - len(known) / len(column)
                if count := rewards.quarantined[name]:
                    result[f"{before}rewards/{name}/quarantined"] = count
            result |= {before + name: value for name, value in rewards.metrics.items()}
        return result


def _own_frames(error: Exception) -> TracebackType | None:
    """What the reward did itself: not the calls that led to it, ours and those of threads.

    None where the error says it all: of a judge that refuses, of a result that is no score.
    """
    frames = None if isinstance(error, Refused) else error.__traceback__
    while frames and frames.tb_frame.f_code.co_filename.startswith(CALLERS):
        frames = frames.tb_next
    return frames


def _raise(error: Exception) -> Any:
    raise error


def _joined(parts: list[Scores]) -> Scores:
    return {name: [score for part in parts for score in part[name]] for name in parts[0]}
