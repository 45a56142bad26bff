"""What goes to the console: it steers no terminal, and ends no run where it cannot be written."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

FAILURES = (OSError, ValueError)  # of a write; ValueError where somebody closed the stream


def counted(number: int, word: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {word}" + "s" * (number != 1)


def printable(text: str) -> str:
    """`text`, which a model or a server may have written, without what steers a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def say_at_once(said: str) -> None:
    """A line on stderr, from a signal handler: a stream may be in the middle of a write."""
    if sys.__stderr__ is not None:
        with suppress(*FAILURES):
            line = "\n" * os.isatty(2) + said + "\n"  # after the "^C" of a terminal
            os.write(2, line.encode("utf-8", "backslashreplace"))


class Console(logging.Handler):
    """Log records on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)


@contextmanager
def forgiving_console(said: str = "") -> Iterator[None]:
    """Within this, stdout and stderr take any text, and what they cannot write is dropped.

    A character that their encoding lacks becomes "?". From the first write that fails on (a pipe
    that is closed, a disk that is full) nothing more is written; `said`, if it is stdout's, goes to
    stderr then. The same holds from the start where there is none: `>&-`.
    """
    before = sys.stdout, sys.stderr
    sys.stderr = err = _Forgiving(sys.stderr)
    sys.stdout = out = _Forgiving(sys.stdout, said)
    try:
        yield
        out.flush()
    finally:
        sys.stdout, sys.stderr = before
        out.end()
        err.end()


class _Forgiving:
    """`stream`, until a write to it fails; it is None where the process was started without it."""

    def __init__(self, stream: Any, said: str = ""):
        self._stream, self._said = stream, said
        self._nowhere: TextIO | None = None
        if stream is None:
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        try:
            return self._stream.write(text.encode(encoding, "replace").decode(encoding))
        except FAILURES:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except FAILURES:
            self._give_up()

    def _give_up(self) -> None:
        """What is in the stream's buffer, and all that comes, goes nowhere."""
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (`end` closes it)
        if self._stream is not None and not self._stream.closed:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        self._stream = self._nowhere = nowhere
        said, self._said = self._said, ""
        if said:
            print(said, file=sys.stderr)

    def end(self) -> None:
        """Closes what `_give_up` opened."""
        if self._nowhere:
            self._nowhere.close()
