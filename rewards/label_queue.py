"""The queue between a run that asks and people who answer: what is open, who looks at what.

Any number of labellers, in any threads. terminal.py and web.py show it to them.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rewards.base import Interrupted
from rewards.labels import Labels

SCALES: dict[str, dict[str, float]] = {
    "binary": {"-": -1.0, "+": 1.0},
    "1-5": {"1": -1.0, "2": -0.5, "3": 0.0, "4": 0.5, "5": 1.0},
}
NAMES = {"-": "bad", "+": "good", "1": "worst", "5": "best"}  # of answers, as people read them

ABSENCE_TIMEOUT = 10.0  # seconds without a request from somebody's page: they have gone
IDLE_TIMEOUT = 60.0  # seconds without a key or a movement: the page is open, and nobody is at it
TOO_LATE = "that one was labelled already, or timed out"
UNDO_EXPIRED = "nothing to undo: you have labelled nothing in this batch"


@dataclass(frozen=True)
class Question:
    """A completion that is to be labelled, and the scores that the other rewards give it."""

    key: str
    prompt: str
    completion: str
    scores: dict[str, float] = field(default_factory=dict)  # not shown: they would sway people
    is_answer: bool = False  # the completion answers its prompt instead of continuing it


class LabelQueue:
    """Open questions, in the order they were asked. An answer is on disk before it counts.

    What somebody looks at who has gone (no request for `absence_timeout` seconds) or is idle (no
    key or movement for `idle_timeout` seconds) is shown to others.
    """

    def __init__(self, labels: Labels, scale: str):
        self.labels, self.values = labels, SCALES[scale]
        self.absence_timeout, self.idle_timeout = ABSENCE_TIMEOUT, IDLE_TIMEOUT
        self.changed = threading.Condition()
        self.open: dict[str, Question] = {}
        self.awaited: set[str] = set()  # open, or answered in a batch that still waits for others
        self.shown: dict[str, str] = {}  # who → key of what they look at
        self.seen: dict[str, float] = {}  # who → when they last asked what to look at
        self.acted: dict[str, float] = {}  # who → when they last did something
        self.given: dict[str, list[Question]] = {}  # who → what was answered, the last one last
        self.closed = False
        self.why = "stopped while people were asked"

    def ask(self, questions: Sequence[Question], timeout: float | None) -> None:
        """Waits until all have an answer, or `timeout` seconds; raises Interrupted if closed."""
        keys = {question.key for question in questions}
        with self.changed:
            self.open |= {question.key: question for question in questions}
            self.awaited |= keys
            self.changed.notify_all()
            done = self.changed.wait_for(
                lambda: self.closed or not keys & self.open.keys(), timeout
            )
            for key in keys:
                self.open.pop(key, None)
            self.awaited -= keys
            self.changed.notify_all()
            if self.closed and done:
                raise Interrupted(self.why)

    def next(self, who: str, acted: bool = True) -> Question | None:
        """What `who` should look at: what they look at already, while it is open, or else nothing
        that somebody who is here looks at. `acted` is whether they have done anything since."""
        with self.changed:
            self.seen[who] = time.monotonic()
            if acted or who not in self.acted:
                self.acted[who] = self.seen[who]
            self._drop_labelled()
            key = self.shown.pop(who, None)
            if key not in self.open:
                taken = {self.shown.get(other) for other in self.here()}
                key = next((key for key in self.open if key not in taken), None)
            if key is None:
                return None
            self.shown[who] = key
            return self.open[key]

    def _drop_labelled(self) -> None:
        """Another run that has the same file of labels may have asked for them, too."""
        labelled = [key for key in self.open if self.labels.find(key)]
        for key in labelled:
            del self.open[key]
        if labelled:
            self.changed.notify_all()

    def here(self) -> set[str]:
        """Who is at a page that is open."""
        with self.changed:
            now = time.monotonic()
            idle = {who for who, then in self.acted.items() if now - then >= self.idle_timeout}
            seen = self.seen.items()
            return {who for who, then in seen if now - then < self.absence_timeout} - idle

    def wait_next(self, who: str) -> Question | None:
        """As `next`, and waits for one; None once the queue is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.next(who))
            return None if self.closed else self.next(who)

    def answer(self, who: str, key: str, value: str) -> bool:
        """Keeps the label `value`, a key of the scale or "skip"; False if it comes too late.

        It does where the question is gone, or where another run has put a label into the file.
        """
        with self.changed:
            question = self.open.get(key)
            if question is None or (value != "skip" and value not in self.values):
                return False
            score = None if value == "skip" else self.values[value]
            kept = self.labels.add(question.prompt, question.completion, score, who)
            del self.open[key]
            if kept:
                self.given.setdefault(who, []).append(question)
            self.changed.notify_all()
            return kept

    def undo(self, who: str) -> bool:
        """Opens again what `who` answered last, for `who`; False if its batch has gone on."""
        with self.changed:
            given = self.given.get(who, [])
            if not given or given[-1].key not in self.awaited:
                return False
            question = given.pop()
            self.labels.remove(question.key)
            self.open = {question.key: question} | self.open
            self.shown[who] = question.key
            self.changed.notify_all()
            return True

    def close(self, why: str | None = None) -> None:
        """Ends all waiting. May be called from a signal handler: the lock is reentrant."""
        with self.changed:
            if not self.closed:
                self.closed, self.why = True, why or self.why
            self.changed.notify_all()


class FrontEnd(Protocol):
    """A way for people to see the queue; `start` may be called again, and does nothing then."""

    def start(self) -> None: ...
    def close(self) -> None: ...
