"""Prompts as `evaluate` takes them, and which ones the run was trained on and evaluated on.

Leaves out which rows a step takes (rl/data.py).
"""

from pathlib import Path

from datasets import Dataset

from adaptiverl.commands.run_folder import Checkpoint
from adaptiverl.config.schema import ConfigError
from adaptiverl.rl.data import load_prompts
from adaptiverl.training import inputs
from adaptiverl.training.keys import RunConfig
from adaptiverl.training.state import changed_rows


def to_evaluate(c: RunConfig, given: Path | None) -> tuple[Dataset, str]:
    """The rows of the file `given`, else those that the run evaluated on, else those that it was
    trained on; and the file or data set that has them. Raises ConfigError."""
    if given:
        with inputs.as_config_error("--prompts"):
            return load_prompts(str(given.resolve()), c.PROMPT_COLUMN), str(given.resolve())
    if c.EVAL_FILE:  # TRAIN_FILE need not be there
        with inputs.as_config_error("EVAL_FILE"):
            return load_prompts(c.EVAL_FILE, c.PROMPT_COLUMN, split="test"), c.EVAL_FILE
    train, held_out = inputs.prompt_files(c)
    return held_out or train, c.TRAIN_FILE


def prompts_of_run(c: RunConfig, checkpoint: Checkpoint) -> tuple[set[str], set[str]]:
    """The different prompts that the run was trained on, and those that it evaluated on.

    Both as texts by `inputs.as_given`. Raises ConfigError where they cannot be read, or where the
    rows are others than those that `checkpoint` was trained on.
    """
    train, evaluated = inputs.prompt_files(c)
    if keys := changed_rows(checkpoint.path, c, inputs.fingerprints(c, train, evaluated)):
        raise ConfigError(f"{' and '.join(keys)}: the rows have changed since the run")
    both = (rows[c.PROMPT_COLUMN] if rows else [] for rows in (train, evaluated))
    trained, held_out = ({inputs.as_given(each, c.SYSTEM) for each in rows} for rows in both)
    return trained, held_out
