"""The command `adaptiverl`, also `python -m adaptiverl`: train, and what reads a run's folder."""

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    # -m puts the working directory first, and a user's train.py or rewards.py there is not ours
    sys.path.append(sys.path.pop(0))

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import NamedTuple

from adaptiverl.config.schema import ConfigError


def _run_folder(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the OUTPUT_DIR of a run")


def _of_report(parser: ArgumentParser) -> None:
    _run_folder(parser)
    parser.add_argument("--out", type=Path, help="where to; the default is RUN/report.html")
    parser.add_argument("--open", action="store_true", help="opens it in the browser")


def _of_compare(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", help="the OUTPUT_DIRs of runs")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="the page")


def _nothing(parser: ArgumentParser) -> None:
    """No arguments."""


def _report(given: Namespace) -> int:
    from adaptiverl.commands.report import write_report

    out = write_report(given.run, given.out)
    print(out)
    if given.open:
        import webbrowser

        webbrowser.open(out.resolve().as_uri())
    return 0


def _doctor(given: Namespace) -> int:
    from adaptiverl.commands.doctor import doctor

    text, status = doctor(given.run)
    print(text)
    return status


def _explain(given: Namespace) -> int:
    from adaptiverl.commands.explain import explain

    print(explain(given.run))
    return 0


def _compare(given: Namespace) -> int:
    from adaptiverl.commands.compare import compare

    print(compare(given.runs, given.out))
    return 0


def _keys(given: Namespace) -> int:
    from adaptiverl.commands import keys

    print(keys.schema() if given.command == "schema" else keys.table())
    return 0


class Subcommand(NamedTuple):
    help: str
    arguments: Callable[[ArgumentParser], None]
    call: Callable[[Namespace], int]  # imports what it needs; the exit status


COMMANDS = {
    "report": Subcommand("one HTML page on a run: RUN/report.html", _of_report, _report),
    "doctor": Subcommand("what is wrong with a run, and what to change", _run_folder, _doctor),
    "compare": Subcommand("what differs between runs: compare.html", _of_compare, _compare),
    "explain": Subcommand("what moved in a run, and when, as text", _run_folder, _explain),
    "keys": Subcommand("all keys of config.json, with defaults and meanings", _nothing, _keys),
    "schema": Subcommand("the JSON schema of config.json, for editors", _nothing, _keys),
}


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
    for name, each in COMMANDS.items():
        each.arguments(commands.add_parser(name, help=each.help))
    given = parser.parse_args(words)
    try:
        return COMMANDS[given.command].call(given)
    except (ConfigError, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
