"""The command `adaptiverl`, also `python -m adaptiverl`: train, explain, keys, schema."""

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    # -m puts the working directory first, and a user's train.py or rewards.py there is not ours
    sys.path.append(sys.path.pop(0))

import argparse

from adaptiverl.config.schema import ConfigError


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["train"]:
        from adaptiverl.commands.arguments import read_command

        command = read_command(words[1:], "adaptiverl train")  # before the imports below: seconds
        import train

        return train.main(command)
    parser = argparse.ArgumentParser(prog="adaptiverl")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    commands.add_parser("train", help="config.json [KEY=VALUE ...] [--dry-run]: trains a model")
    explain = commands.add_parser("explain", help="what moved the learning rate of a run, and when")
    explain.add_argument("run", type=Path, help="the OUTPUT_DIR of a run")
    commands.add_parser("keys", help="all keys of config.json, with defaults and meanings")
    commands.add_parser("schema", help="the JSON schema of config.json, for editors")
    given = parser.parse_args(words)
    try:
        if given.command == "explain":
            from adaptiverl.commands.explain import explain as text

            print(text(given.run))
        else:
            from adaptiverl.commands import keys

            print(keys.schema() if given.command == "schema" else keys.table())
    except ConfigError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
