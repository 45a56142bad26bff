"""Which files hold prompts, by the end of their names. Imports no torch; data.py reads them."""

from pathlib import Path

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def file_format(source: str) -> str | None:
    """What a file of the name `source` holds; None for a name that no file of prompts has."""
    return FORMATS.get(Path(source).suffix.lower())


def check_file(source: str) -> None:
    """Raises FileNotFoundError where `source` has the name of a file, and there is none."""
    if file_format(source) and not Path(source).is_file():
        where = "" if Path(source).is_absolute() else f" in {Path.cwd()}"
        raise FileNotFoundError(f"there is no file {source}{where}")
