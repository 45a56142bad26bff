"""The source files of `python` rewards: which have changed since a checkpoint, and what is said.

Watched is the file that defines a reward's function. The modules that it imports are not.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from adaptiverl.training.keys import RunConfig
from rewards import CompositeReward, PythonReward
from rewards.function import Source

FILE = "reward_code.json"  # in a checkpoint: fingerprints by FUNCTION
Sources = Mapping[str, Source]  # by FUNCTION


def sources(*rewards: CompositeReward) -> Sources:
    """Of all `python` rewards among `rewards`; functions without a file are left out."""
    every = [each for part in rewards for each in part.rewards.values()]
    named = {each.function: each.source for each in every if isinstance(each, PythonReward)}
    return {function: source for function, source in named.items() if source}


def changed(folder: Path, now: Sources) -> Sources:
    """Those of `now` that are others than when the checkpoint in `folder` was written."""
    file = folder / FILE  # earlier versions wrote none
    before = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return {
        function: source
        for function, source in now.items()
        if before.get(function, source.fingerprint) != source.fingerprint
    }


def trains(c: RunConfig, functions: Sources) -> bool:
    """Whether one of `functions` is among REWARDS, so that eval/score is of it."""
    return any(isinstance(each, PythonReward) and each.function in functions for each in c.REWARDS)


def in_words(c: RunConfig, functions: Sources) -> str:
    """Which rewards of the config they are, and their files."""
    every = [each for each in (*c.REWARDS, *c.HELD_OUT) if isinstance(each, PythonReward)]
    return ", ".join(
        f"{each.name!r} ({functions[each.function].file})"
        for each in every
        if each.function in functions
    )
