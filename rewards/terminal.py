"""Labelling on the terminal: one key per completion.

+ good   - bad   (or 1 to 5)   s skip   u undo
"""

import os
import select
import shutil
import termios
import textwrap
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rewards.label_queue import NAMES, TOO_LATE, UNDO_EXPIRED, LabelQueue, Question

WHO = "terminal"
GONE = (
    "the terminal on which people were asked is gone; resume on another one, or set "
    '"WHERE": "web" for this reward'
)
ESC = "\033"
CONSOLE = ESC + "[["  # of the Linux console's F1 to F5, before a letter
POLL = 0.2  # seconds after which a question that has gone is noticed
PART = 0.05  # seconds within which the bytes of one key follow each other
KEY_ALIASES = {"=": "+", "y": "+", "_": "-", "n": "-"}  # shift or not; yes and no


class Terminal:
    """Shows the queue on `device`, the controlling terminal; raises ValueError without one."""

    def __init__(self, queue: LabelQueue, question: str, device: str = "/dev/tty"):
        try:
            self.file = os.open(device, os.O_RDWR | os.O_NOCTTY)
        except OSError as error:
            raise ValueError(
                'people cannot be asked: this process has no terminal; "WHERE": "web" needs none'
            ) from error
        self.queue, self.question = queue, question
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._labelling, daemon=True)
            self.thread.start()

    def close(self) -> None:
        if self.thread and self.thread is not threading.current_thread():
            self.thread.join()

    def _labelling(self) -> None:
        try:
            self._label()
        except (OSError, termios.error):  # of a terminal that is gone, each in its own way
            self.queue.close(GONE)

    def _label(self) -> None:
        while question := self.queue.wait_next(WHO):
            with self._single_keys():  # before it is shown: a quick key is not echoed either
                self._show(question)
                key = self._key_for(question)
            if key == "u":
                if not self.queue.undo(WHO):
                    self._write(f"{UNDO_EXPIRED}\n")
            elif key and not self.queue.answer(WHO, question.key, "skip" if key == "s" else key):
                self._write(f"{TOO_LATE}\n")

    def _key_for(self, question: Question) -> str | None:
        """The first key that means something; None if the question goes away."""
        while self.queue.open.get(question.key) is question and not self.queue.closed:
            if select.select([self.file], [], [], POLL)[0]:
                key = self._read_key()
                if not key:
                    raise OSError(GONE)
                key = KEY_ALIASES.get(key, key)
                if key in self.queue.values or key in ("s", "u"):
                    self._write(f"{key}\n")
                    return key
        if not self.queue.closed:  # or the run says itself why it stops
            self._write("no answer within TIMEOUT\n")
        return None

    def _read_key(self) -> str:
        """One key, lower-case; "" if the terminal is gone. Of a function key, all its bytes.

        These begin with ESC: ESC [ … with a letter or ~ at its end, or ESC O and a letter.
        """
        key = self._byte()
        if key != ESC:
            return key.lower()
        key += self._rest()
        while key.endswith(ESC) and (more := self._rest()):  # Alt with a function key: ESC ESC [ …
            key += more
        if key.endswith("O"):
            key += self._rest()
        elif key.endswith("["):
            while more := self._rest():
                key += more
                if "@" <= more <= "~" and key != CONSOLE:
                    break
        return key

    def _byte(self) -> str:
        return os.read(self.file, 1).decode("latin-1")

    def _rest(self) -> str:
        """The next byte of the same key, "" if there is none."""
        return self._byte() if select.select([self.file], [], [], PART)[0] else ""

    def _show(self, question: Question) -> None:
        width = min(shutil.get_terminal_size().columns, 100)
        bold, plain = ("", "") if "NO_COLOR" in os.environ else ("\033[1m", "\033[0m")
        keys = "  ".join(f"[{k}] {NAMES[k]}" if k in NAMES else f"[{k}]" for k in self.queue.values)
        self._write(
            f"\n{self.question}  ({len(self.queue.open)} left)\n"
            f"{_wrapped(question.prompt, width)}\n"
            f"{bold}{_wrapped(question.completion, width)}{plain}\n"
            f"{keys}  [s] skip  [u] undo  "
        )

    def _write(self, text: str) -> None:
        os.write(self.file, text.encode())

    @contextmanager
    def _single_keys(self) -> Iterator[None]:
        """Keys come one by one, unechoed, none from before; Ctrl-C is a signal as ever."""
        before: list[Any] = termios.tcgetattr(self.file)
        tty.setcbreak(self.file, termios.TCSAFLUSH)
        try:
            yield
        finally:
            with suppress(termios.error):  # gone: there is nothing to put back
                termios.tcsetattr(self.file, termios.TCSADRAIN, before)


def printable(text: str) -> str:
    """Without control characters, with which a model could steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def _wrapped(text: str, width: int) -> str:
    lines = printable(text).split("\n")
    return "\n".join(textwrap.fill(line, width) for line in lines)
