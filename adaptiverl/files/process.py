"""The process of a run: the signals that stop it, its seconds and its memory."""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


class StopSignal:
    """Remembers the first SIGINT, SIGTERM or SIGHUP and calls `then`; a second ends the process.

    SIGHUP, of a terminal that is closed, is left alone where it is ignored: under nohup. A context
    manager: afterwards signals do what they did before.

    In a child that a reward forks SIGTERM does what it did before, too, so that multiprocessing's
    `terminate` ends it. The other two a terminal sends to parent and child: the first of them only
    tells the run to stop, which needs what the child computes.
    """

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.number, self.then = 0, then
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._remember)
        ENTERED.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        ENTERED.remove(self)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.number = number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        self.then()

    def forked(self) -> None:
        """In a child: it stops by itself, and nothing of the run."""
        self.then = lambda: None
        if signal.SIGTERM in self.before:
            signal.signal(signal.SIGTERM, self.before[signal.SIGTERM])


ENTERED: list[StopSignal] = []


def _mask_sigterm(how: int) -> None:
    """Around a fork: until `forked` a child would take its SIGTERM for the run's, or lose it."""
    if ENTERED:
        signal.pthread_sigmask(how, {signal.SIGTERM})


def _in_child() -> None:
    for stop in ENTERED:
        stop.forked()
    _mask_sigterm(signal.SIG_UNBLOCK)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=lambda: _mask_sigterm(signal.SIG_BLOCK),
        after_in_parent=lambda: _mask_sigterm(signal.SIG_UNBLOCK),
        after_in_child=_in_child,
    )


class Paused(Exception):
    """The step cannot be finished now; a resumed run may finish it. The message says why."""


class WaitEnded(Paused):
    """Paused because the waiting for people or judges was ended, most often by a signal."""


class Stopwatch:
    """Seconds between laps, by name; laps of one name add up."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now


def peak_memory() -> int:
    """Bytes: the most this process held, on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
