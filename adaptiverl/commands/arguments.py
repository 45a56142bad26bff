"""What follows `python train.py`, read without torch: mistakes in it are told at once."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adaptiverl.config.loading import load_config
from adaptiverl.config.schema import ConfigError
from adaptiverl.training.keys import RunConfig

Command = tuple[RunConfig, bool]  # and whether it is a dry run


def read_command(words: Sequence[str] | None = None, program: str = "python train.py") -> Command:
    """The config that the command line names, and whether --dry-run is given.

    A mistake ends the process: one line on stderr, status 2.
    """
    parser = argparse.ArgumentParser(
        prog=program, description="REINFORCE fine-tuning of a language model."
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
        return load_config(path, overrides, schema=RunConfig), given.dry_run
    except ConfigError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
