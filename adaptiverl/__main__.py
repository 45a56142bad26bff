"""The command `adaptiverl`, also `python -m adaptiverl`: train, and what reads a run's folder."""

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    # -m puts the working directory first, and a user's train.py or rewards.py there is not ours
    sys.path.append(sys.path.pop(0))

import argparse
import difflib
import logging
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from adaptiverl.commands.run_folder import RunReader
from adaptiverl.config.schema import ConfigError
from adaptiverl.files.console import Console, forgiving_console, printable

# What a command does is imported by it: most need seconds, and a mistake is told before


def _report(given: Namespace) -> int:
    from adaptiverl.commands.report import write_report
    from adaptiverl.commands.written import check_writable

    if given.out or given.run.is_dir():
        check_writable(given.out or given.run / "report.html", "name another file by --out")
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


def _compare(given: Namespace) -> int:
    from adaptiverl.commands.compare import compare

    print(compare(given.runs, given.out))
    return 0


def _explain(given: Namespace) -> int:
    from adaptiverl.commands.explain import explain

    print(explain(given.run))
    return 0


def _use_model(given: Namespace) -> int:
    run = RunReader(given.run)
    return import_module(f"adaptiverl.commands.{given.command}").main(given, run)


def _keys(given: Namespace) -> int:
    from adaptiverl.commands.keys import table

    print(table(given.words))
    return 0


def _schema(given: Namespace) -> int:
    from adaptiverl.commands.keys import schema

    print(schema())
    return 0


def _count(text: str) -> int:
    """A whole number above 0."""
    if not text.isascii() or not text.isdigit() or (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return number


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or (number := int(text)) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {2**32 - 1}")
    return number


def _file(text: str) -> Path:
    """Where a file can be written, known before the work is done."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


class Argument:
    """What argparse's add_argument takes."""

    def __init__(self, *names: str, **options: Any):
        self.names, self.options = names, options


class Command(NamedTuple):
    help: str
    run: Callable[[Namespace], int]
    arguments: list[Argument]


RUN = Argument("run", metavar="RUN", type=Path, help="the OUTPUT_DIR of a run")
CHECKPOINT = Argument(
    "--checkpoint",
    metavar="best|final|N",
    help="which checkpoint; N is a step. Without it: best if there is one, else the newest",
)
SEED = Argument("--seed", type=_seed, help="of the random numbers; the run's SEED if absent")
ALL_REWARDS = Argument(
    "--all-rewards", action="store_true", help="also those that cost money or ask people"
)
COMMANDS = {
    "generate": Command(
        "completions by the trained model, with their rewards; without prompts, a chat",
        _use_model,
        [
            RUN,
            Argument("prompts", metavar="PROMPT", nargs="*", help="else --file, or lines of stdin"),
            Argument("--file", type=Path, help="prompts: .json, .jsonl, .csv or .parquet"),
            Argument("-n", "--n", type=_count, help="completions per prompt; 4, in a chat 1"),
            Argument("--base", action="store_true", help="also those of the model before training"),
            CHECKPOINT,
            SEED,
            ALL_REWARDS,
        ],
    ),
    "evaluate": Command(
        "the trained model against the model before training: rewards, KL, diversity",
        _use_model,
        [
            RUN,
            Argument(
                "--prompts",
                type=Path,
                help="file of prompts; else EVAL_FILE, EVAL_SPLIT or TRAIN_FILE",
            ),
            Argument("-n", "--n", type=_count, default=256, help="completions by each model; 256"),
            Argument("--json", type=_file, help="where to write; RUN/evaluation.json if absent"),
            CHECKPOINT,
            SEED,
            ALL_REWARDS,
        ],
    ),
    "export": Command(
        "the trained model as a folder, with a model card, that transformers or peft load",
        _use_model,
        [
            RUN,
            Argument("dir", metavar="DIR", type=Path, help="a new folder"),
            Argument("--merge", action="store_true", help="merge the adapter into its base"),
            Argument("--push", metavar="HUB_ID", help="also upload it to the Hugging Face hub"),
            CHECKPOINT,
        ],
    ),
    "report": Command(
        "one HTML page on a run: RUN/report.html",
        _report,
        [
            RUN,
            Argument("--out", type=_file, help="where to; RUN/report.html if absent"),
            Argument("--open", action="store_true", help="open it in the browser"),
        ],
    ),
    "doctor": Command("what is wrong with a run, and what to change", _doctor, [RUN]),
    "compare": Command(
        "what differs between runs: compare.html",
        _compare,
        [
            Argument("runs", metavar="RUN", type=Path, nargs="+", help="the OUTPUT_DIRs of runs"),
            Argument("--out", type=_file, default=Path("compare.html"), help="the page"),
        ],
    ),
    "explain": Command("what moved in a run, and when, as text", _explain, [RUN]),
    "keys": Command(
        "all keys of config.json, with defaults and meanings",
        _keys,
        [Argument("words", nargs="*", help="only those with one of these words: kl, judge")],
    ),
    "schema": Command("the JSON schema of config.json, for editors", _schema, []),
}


@forgiving_console()
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
    for name, entry in COMMANDS.items():
        own = commands.add_parser(name, help=entry.help, description=entry.help)
        for argument in entry.arguments:
            own.add_argument(*argument.names, **argument.options)
    if (word := next(iter(words), "-")) not in COMMANDS and not word.startswith("-"):
        nearest = difflib.get_close_matches(word, ["train", *COMMANDS], n=1)
        hint = f"the nearest is {nearest[0]}" if nearest else "adaptiverl --help lists them"
        parser.error(f"there is no command {word}; {hint}")
    given = parser.parse_args(words)
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[Console()]
    )
    try:
        return COMMANDS[given.command].run(given)
    except (ConfigError, OSError) as mistake:
        print(f"error: {printable(str(mistake))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
