"""What goes to the console: it steers no terminal, and stands above the progress bar."""

import logging
import sys

from tqdm import tqdm


def printable(text: str) -> str:
    """`text`, which a model or a server may have written, without what steers a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


class Console(logging.Handler):
    """Log records on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)
