"""What judges answered and what it cost, on disk as it comes: a kill loses nothing."""

import sqlite3
from pathlib import Path


class JudgeCache:
    """Judgements by key, and what each judge's answers cost; of all processes that share the file.

    `judge` names the account on which answers are booked. Raises ValueError where `path` is no
    file for it.
    """

    def __init__(self, path: Path, judge: str):
        self.path, self.judge = path, judge
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.base = sqlite3.connect(path, isolation_level=None, timeout=60)  # each line at once
            try:
                self._prepare()
            except sqlite3.Error:
                self.base.close()
                raise
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"CACHE {path}: it cannot be used ({error}); name an SQLite file, or a new one in "
                "a folder that can be written to"
            ) from error

    def _prepare(self) -> None:
        self.base.execute(
            "CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, score REAL)"
        )
        self.base.execute(
            "CREATE TABLE IF NOT EXISTS accounts (judge TEXT PRIMARY KEY, calls INTEGER, "
            "tokens_in INTEGER, tokens_out INTEGER)"
        )

    @property
    def spent(self) -> tuple[int, int, int]:
        """Answers that this judge was paid for, and their tokens in and out."""
        row = self.base.execute(
            "SELECT calls, tokens_in, tokens_out FROM accounts WHERE judge = ?", (self.judge,)
        ).fetchone()
        return row or (0, 0, 0)

    def get(self, key: str) -> float | None:
        row = self.base.execute("SELECT score FROM judgements WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def add(self, key: str, score: float | None, tokens_in: int, tokens_out: int) -> None:
        """One answer that was paid for, whether it was of use or not."""
        with self.base:
            self.base.execute("BEGIN IMMEDIATE")
            self.base.execute(
                "INSERT INTO accounts VALUES (?, 1, ?, ?) ON CONFLICT (judge) DO UPDATE SET "
                "calls = calls + 1, tokens_in = tokens_in + excluded.tokens_in, "
                "tokens_out = tokens_out + excluded.tokens_out",
                (self.judge, tokens_in, tokens_out),
            )
            if score is not None:
                self.base.execute("INSERT OR REPLACE INTO judgements VALUES (?, ?)", (key, score))

    def close(self) -> None:
        self.base.close()
