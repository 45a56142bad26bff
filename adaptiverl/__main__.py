"""python -m adaptiverl explain RUN: says what moved the learning rate of the run in that folder."""

import argparse
import sys
from pathlib import Path

from adaptiverl.run.config import UserError
from adaptiverl.run.explain import explain


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m adaptiverl")
    commands = parser.add_subparsers(required=True, metavar="explain")
    command = commands.add_parser("explain", help="what moved the rate of a run, and when")
    command.add_argument("run", type=Path, help="the OUTPUT_DIR of a run")
    try:
        print(explain(parser.parse_args(arguments).run))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
