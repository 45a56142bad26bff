"""What this process has under way at its judges: counted together, and asked only once.

Several rewards, and batches in threads of their own, may ask the same judge at once. Answers that
have come are the cache's; other processes do not see what stands here.
"""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

UNREADABLE = 8  # questions without one readable answer, after which none is asked again for that
# How asking a question ended. What was "dropped" (a full budget, an interrupt, an error elsewhere)
# says nothing of the question: whoever else needs it asks.
Outcome = Literal["answered", "failed", "rejected", "dropped"]


@dataclass(eq=False)
class Hold:
    """An answer that is awaited, with the tokens that it takes, about: in and out."""

    tokens: tuple[float, float]


@dataclass(eq=False)
class Account:
    """One judge's account in one cache; all of this process that use it share this object."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    holds: set[Hold] = field(default_factory=set)
    questions: dict[str, Future] = field(default_factory=dict)  # by key: what waits for its answer
    readable: bool = False  # whether an answer has ever been what was asked for
    unreadable: set[str] = field(default_factory=set)  # questions answered otherwise, until one is
    warned: set[str] = field(default_factory=set)  # of what, once for all

    def claim(self, key: str) -> Future | None:
        """None: the caller asks, and calls `settle`. Else what that will give, of who asks."""
        with self.lock:
            if other := self.questions.get(key):
                return other
            own: Future = Future()
            own.set_running_or_notify_cancel()  # so that who waits for it cannot cancel it
            self.questions[key] = own
            return None

    def settle(self, key: str, outcome: Outcome, trouble: str = "") -> None:
        """Ends the waiting for this question, with (outcome, trouble)."""
        with self.lock:
            self.questions.pop(key).set_result((outcome, trouble))

    def first_time(self, warning: str) -> bool:
        with self.lock:
            known = warning in self.warned
            self.warned.add(warning)
            return not known

    def release(self, hold: Hold) -> None:
        with self.lock:
            self.holds.discard(hold)

    def read(self, key: str, readable: bool) -> None:
        """Notes whether an answer was what was asked for."""
        with self.lock:
            self.readable |= readable
            if not self.readable:
                self.unreadable.add(key)

    @property
    def is_hopeless(self) -> bool:
        """Whether nothing that came could be read: the model does not know the form."""
        return not self.readable and len(self.unreadable) >= UNREADABLE


_accounts: dict[tuple[Path, str], Account] = {}
_lock = threading.Lock()


def account_of(cache: Path, judge: str) -> Account:
    """The account of `judge`, as JudgeCache has it, in the file `cache`."""
    with _lock:
        return _accounts.setdefault((cache.resolve(), judge), Account())
