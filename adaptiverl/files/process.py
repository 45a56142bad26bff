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
    """

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.number, self.then = 0, then
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.number = number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        self.then()


class Paused(Exception):
    """The step cannot be finished now; a resumed run may finish it. The message says why."""


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
