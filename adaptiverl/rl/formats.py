"""Which files hold prompts, by the end of their names. Imports no torch; data.py reads them."""

from pathlib import Path

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def check_file(source: str) -> None:
    """Raises FileNotFoundError where `source` has the name of a file, and there is none."""
    if Path(source).suffix in FORMATS and not Path(source).is_file():
        raise FileNotFoundError(f"there is no file {source}")
