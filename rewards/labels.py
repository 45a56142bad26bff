"""What people answered, on disk as it is given: a kill loses none, and none is asked for again."""

import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Collection, Sequence
from pathlib import Path


class Labels:
    """Labels of completions by (question, scale, prompt, completion); None is a skip.

    Safe to be used from several threads and processes. Scores are −1 to 1.
    """

    def __init__(self, path: str | Path, question: str, scale: str):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # Autocommit: each label is on disk when `add` returns.
        self.base = sqlite3.connect(path, isolation_level=None, timeout=60, check_same_thread=False)
        self.base.execute(
            "CREATE TABLE IF NOT EXISTS labels (key TEXT PRIMARY KEY, score REAL, who TEXT, "
            "time REAL, question TEXT, scale TEXT, prompt TEXT, completion TEXT)"
        )
        # A table of its own, so that files of earlier versions go on to be read. One of them had a
        # table "batches" of other columns.
        self.base.execute(
            "CREATE TABLE IF NOT EXISTS batch_times "
            "(batch TEXT PRIMARY KEY, asked REAL, ended REAL)"
        )
        self.question, self.scale = question, scale

    def key(self, prompt: str, completion: str) -> str:
        asked = json.dumps([self.question, self.scale, prompt, completion])
        return hashlib.sha256(asked.encode()).hexdigest()

    def batch(self, step: int | None, keys: Sequence[str]) -> tuple[str, float, float | None]:
        """Its name, and when it was asked first and last; the latter is None while it is asked.

        Labels up to the first are what the step knew, and up to the last what it was given, however
        often it is repeated after a run was ended. Without a step a batch is a new one each time.
        """
        now = time.time()
        if step is None:
            return "", now, None
        name = hashlib.sha256(json.dumps([step, *keys]).encode()).hexdigest()
        self.base.execute("INSERT OR IGNORE INTO batch_times VALUES (?, ?, NULL)", (name, now))
        found = self.base.execute("SELECT asked, ended FROM batch_times WHERE batch = ?", (name,))
        return name, *found.fetchone()

    def end(self, batch: str) -> float:
        """Now, up to which its labels count from here on."""
        now = time.time()
        self.base.execute("UPDATE batch_times SET ended = ? WHERE batch = ?", (now, batch))
        return now

    def find(self, key: str, until: float = math.inf) -> tuple[float | None] | None:
        """(score,), (None,) if it was skipped, None if it was not labelled until then."""
        return self.base.execute(
            "SELECT score FROM labels WHERE key = ? AND time <= ?", (key, until)
        ).fetchone()

    def add(self, prompt: str, completion: str, score: float | None, who: str) -> bool:
        """Whether it is the first label of this completion; a second one changes nothing."""
        key = self.key(prompt, completion)
        row = (key, score, who, time.time(), self.question, self.scale, prompt, completion)
        done = self.base.execute("INSERT OR IGNORE INTO labels VALUES (?,?,?,?,?,?,?,?)", row)
        return done.rowcount == 1

    def remove(self, key: str) -> None:
        self.base.execute("DELETE FROM labels WHERE key = ?", (key,))

    def learned(
        self,
        last: int,
        until: float = math.inf,
        also: Collection[str] = (),
        ended: float = math.inf,
    ) -> list[tuple[str, float]]:
        """(completion, score) of the `last` that were given to this question, oldest first.

        Of those until then, and until `ended` of the keys `also`.
        """
        rows = self.base.execute(
            "SELECT completion, score FROM labels WHERE question = ? AND scale = ? "
            "AND score IS NOT NULL AND (time <= ? OR time <= ? AND "
            f"key IN ({', '.join('?' * len(also))})) "
            "ORDER BY time DESC, key LIMIT ?",
            (self.question, self.scale, until, ended, *also, last),
        )
        return rows.fetchall()[::-1]

    def close(self) -> None:
        self.base.close()
