"""What people answered, on disk as it is given: a kill loses none, and nothing is asked twice."""

import hashlib
import json
import sqlite3
import time
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
        self.question, self.scale = question, scale

    def key(self, prompt: str, completion: str) -> str:
        asked = json.dumps([self.question, self.scale, prompt, completion])
        return hashlib.sha256(asked.encode()).hexdigest()

    def find(self, key: str) -> tuple[float | None] | None:
        """(score,), (None,) if it was skipped, None if it was never labelled."""
        return self.base.execute("SELECT score FROM labels WHERE key = ?", (key,)).fetchone()

    def add(self, prompt: str, completion: str, score: float | None, who: str) -> bool:
        """Whether it is the first label of this completion; a second one changes nothing."""
        key = self.key(prompt, completion)
        row = (key, score, who, time.time(), self.question, self.scale, prompt, completion)
        done = self.base.execute("INSERT OR IGNORE INTO labels VALUES (?,?,?,?,?,?,?,?)", row)
        return done.rowcount == 1

    def remove(self, key: str) -> None:
        self.base.execute("DELETE FROM labels WHERE key = ?", (key,))

    def learned(self, last: int) -> list[tuple[str, float]]:
        """(completion, score) of the `last` that were given to this question, oldest first."""
        rows = self.base.execute(
            "SELECT completion, score FROM labels WHERE question = ? AND scale = ? "
            "AND score IS NOT NULL ORDER BY time DESC, key LIMIT ?",
            (self.question, self.scale, last),
        )
        return rows.fetchall()[::-1]
