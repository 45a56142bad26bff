"""What goes to the console: it steers no terminal, and ends no run where it cannot be written."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def counted(number: int, word: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {word}" + "s" * (number != 1)


def printable(text: str) -> str:
    """`text`, which a model or a server may have written, without what steers a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


class Console(logging.Handler):
    """Log records on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)


@contextmanager
def forgiving_console(said: str = "") -> Iterator[None]:
    """Within this, stdout and stderr take any text, and what they cannot write is dropped.

    A character that their encoding lacks becomes "?". From the first write that fails on (a pipe
    that is closed, a disk that is full) nothing more is written; `said`, if it is stdout's, goes to
    stderr then.
    """
    before = sys.stdout, sys.stderr
    sys.stderr = _Forgiving(sys.stderr)
    sys.stdout = _Forgiving(sys.stdout, said)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


class _Forgiving:
    """`stream`, until a write to it fails."""

    def __init__(self, stream: Any, said: str = ""):
        self._stream, self._said = stream, said

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        try:
            return self._stream.write(text.encode(encoding, "replace").decode(encoding))
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """What is in the stream's buffer, and all that comes, goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._said:
            print(self._said, file=sys.stderr)
