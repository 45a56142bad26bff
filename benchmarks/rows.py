"""Results of a benchmark: one line of JSON per run, and the report that is made of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def publish(path: Path, report: Callable[[Rows], str]) -> None:
    """Prints the report on the rows in `path`, and writes it beside them."""
    text = report(read(path))
    path.with_suffix(".md").write_text(text)
    print(text)
