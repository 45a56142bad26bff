"""What judges said and what it cost, on disk as it comes: a kill loses nothing."""

import sqlite3
import time
from pathlib import Path


class Ledger:
    """Judgements and what they cost, on disk as they come."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.base = sqlite3.connect(path, isolation_level=None, timeout=60)  # each line at once
        self.base.execute(
            "CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, score REAL)"
        )
        self.base.execute(
            "CREATE TABLE IF NOT EXISTS calls (time REAL, tokens_in INTEGER, tokens_out INTEGER)"
        )

    @property
    def spent(self) -> tuple[int, int, int]:
        """Answers paid for, their tokens in and out: of all processes that share the file."""
        row = self.base.execute(
            "SELECT count(*), coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0) FROM calls"
        ).fetchone()
        return tuple(row)

    def get(self, key: str) -> float | None:
        row = self.base.execute("SELECT score FROM judgements WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def add(self, key: str, score: float | None, tokens_in: int, tokens_out: int) -> None:
        """One answer that was paid for, whether it was of use or not."""
        with self.base:
            self.base.execute("BEGIN")
            self.base.execute(
                "INSERT INTO calls VALUES (?, ?, ?)", (time.time(), tokens_in, tokens_out)
            )
            if score is not None:
                self.base.execute("INSERT OR REPLACE INTO judgements VALUES (?, ?)", (key, score))

    def close(self) -> None:
        self.base.close()
