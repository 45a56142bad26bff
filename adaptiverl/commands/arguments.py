"""What follows `python train.py`, read without torch: mistakes in it are told at once."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from adaptiverl.config.loading import load_config
from adaptiverl.config.schema import ConfigError
from adaptiverl.rl.formats import check_file
from adaptiverl.training.keys import RunConfig
from rewards import PythonReward

Command = tuple[RunConfig, bool]  # and whether it is a dry run


def read_command(words: Sequence[str] | None = None, program: str = "python train.py") -> Command:
    """The config that the command line names, and whether --dry-run is given.

    A mistake ends the process: one line on stderr, status 2.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="REINFORCE fine-tuning of a language model.",
        usage=f"{program} config.json [KEY=VALUE ...] [--dry-run]",
    )
    parser.add_argument("words", nargs="*", metavar="config.json [KEY=VALUE ...]")
    parser.add_argument("--dry-run", action="store_true", help="one batch, no training")
    parser.epilog = (
        "config.json may have comments; KEY=VALUE replaces a key; `python -m adaptiverl keys` "
        "lists all keys"
    )
    given = parser.parse_intermixed_args(words)  # options may stand anywhere
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # where FUNCTION of a python reward may be
    try:
        if not given.words:
            raise ConfigError(f"which config? Type: {program} config.json")
        path, *overrides = given.words
        if "=" in path and not Path(path).exists():
            raise ConfigError(f"the config comes first: {program} config.json {path}")
        config = load_config(path, overrides, schema=RunConfig)
        _check_files(config)
        return config, given.dry_run
    except ConfigError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


def _check_files(c: RunConfig) -> None:
    """Raises ConfigError for a file of prompts, or a module of a reward, that is not there."""
    for key in ("TRAIN_FILE", "EVAL_FILE"):
        try:
            check_file(getattr(c, key) or "")
        except FileNotFoundError as error:
            raise ConfigError(f"{key}: {error}") from error
    for key in ("REWARDS", "HELD_OUT"):
        for i, reward in enumerate(getattr(c, key)):
            if isinstance(reward, PythonReward):
                name = reward.function.partition(":")[0].partition(".")[0]
                if name not in sys.modules and find_spec(name) is None:
                    raise ConfigError(
                        f"{key}.{i}: FUNCTION {reward.function}: there is no module {name!r} in "
                        f"the working directory ({Path.cwd()}), and none is installed"
                    )
