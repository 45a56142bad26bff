"""What is warned of before the model loads: keys and files that do less than they seem to."""

import json
from collections.abc import Iterator

from datasets import Dataset

from adaptiverl.training.inputs import as_given
from adaptiverl.training.keys import RunConfig
from rewards import LengthReward


def doubts(
    c: RunConfig, train: Dataset, evaluated: Dataset | None, last_step: int
) -> Iterator[str]:
    """Of the prompts that are trained and evaluated on, and of a run of `last_step` steps."""
    if evaluated and last_step < c.EVAL_EVERY:
        yield (
            f"EVAL_EVERY {c.EVAL_EVERY} is above the {last_step} steps of the run: nothing is "
            "evaluated"
        )
    for name, length in c.cycles().items():
        if length > last_step:
            as_long = json.dumps({"name": name, "cycle_length": last_step})
            yield (
                f"LR_RULE {name}: its cycle has {length:g} steps and the run {last_step}, so the "
                f"rate goes only a part of the way. {as_long} is as long as the run"
            )
    if evaluated is not None and c.EVAL_FILE:  # an EVAL_SPLIT has no prompts that are trained on
        here, there = (
            {as_given(prompt, c.SYSTEM) for prompt in rows[c.PROMPT_COLUMN]}
            for rows in (train, evaluated)
        )
        if count := len(here & there):
            yield (
                f"{count} of {len(there)} prompts of EVAL_FILE are also in TRAIN_FILE: what is "
                "evaluated on is trained on"
            )
    for key in ("REWARDS", "HELD_OUT"):
        for i, reward in enumerate(getattr(c, key)):
            if isinstance(reward, LengthReward) and reward.unit == "tokens":
                name = "TARGET" if reward.target else "MIN"
                if (wanted := reward.target or reward.min or 0) > c.MAX_NEW_TOKENS:
                    yield (
                        f"{key}.{i}: no completion reaches {name} {wanted}: it has at most "
                        f"{c.MAX_NEW_TOKENS} tokens (MAX_NEW_TOKENS)"
                    )
