"""What stands after `python train.py`, read without torch: mistakes in it are told at once."""

import argparse
import sys
from pathlib import Path

from adaptiverl.run.config import Config, UserError
from adaptiverl.run.reading import load_config

Command = tuple[Config, bool]  # and whether it is a dry run


def read_command() -> Command:
    """The config that the command line names, and whether --dry-run is given.

    A mistake ends the process: one line on stderr, status 2.
    """
    parser = argparse.ArgumentParser(
        prog="train.py", description="REINFORCE fine-tuning of a language model."
    )
    parser.add_argument("words", nargs="*", metavar="config.json [KEY=VALUE ...]")
    parser.add_argument("--dry-run", action="store_true", help="one batch, no training")
    parser.epilog = (
        "config.json may have comments; its keys are in README.md; KEY=VALUE replaces one"
    )
    given = parser.parse_intermixed_args()  # options may stand anywhere
    try:
        if not given.words:
            raise UserError("which config? Type: python train.py config.json")
        path, *overrides = given.words
        if "=" in path and not Path(path).exists():
            raise UserError(f"the config comes first: python train.py config.json {path}")
        return load_config(path, overrides), given.dry_run
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
