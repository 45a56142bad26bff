"""Prompts: loading them, and which of them each step trains on."""

import glob
import hashlib
import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute
import torch
from datasets import Dataset, Value
from datasets.exceptions import DatasetGenerationError
from datasets.utils.logging import disable_progress_bar, get_verbosity, set_verbosity

from adaptiverl.rl.chat import NO_MESSAGES, mistake
from adaptiverl.rl.csv_rows import read_csv, separator_hint
from adaptiverl.rl.exact import exact_dataset
from adaptiverl.rl.formats import FORMATS, check_file, file_format
from adaptiverl.rl.json_rows import read_json


def load_prompts(source: str, column: str, split: str = "train") -> Dataset:
    """The rows of a JSON, JSONL, CSV or Parquet file, or of a hub data set's `split`.

    `column` holds texts, or conversations (chat.py). Raises FileNotFoundError or ValueError that
    says what is missing: the file, rows, `column`, or prompts in it.
    """
    disable_progress_bar()
    path = Path(source)
    check_file(source)
    if (kind := file_format(source)) is not None:
        if path.stat().st_size == 0:
            raise ValueError(f"{source} is empty")
        rows = _read(path, kind, column)
    elif path.exists():
        raise ValueError(f"{source} must end in one of {', '.join(FORMATS)}")
    else:
        rows = datasets.load_dataset(source, split=split)
    if not rows.num_rows:
        raise ValueError(f"{source} has no rows")
    if column not in rows.column_names:
        only = ", ".join(rows.column_names)
        hint = separator_hint(only) if kind == "csv" and len(rows.column_names) == 1 else None
        only += f": {hint}" if hint else ""
        raise ValueError(f"{source} has no column {column!r}, only {only}")
    if holds_chats(rows, column):
        found = ((row, mistake(prompt, column)) for row, prompt in enumerate(rows[column]))
        if wrong := next(((row, why) for row, why in found if why), None):
            row, why = wrong
            raise ValueError(f"{source}: row {row} (counted from 0) of column {column!r} {why}")
    elif (odd := _not_text(rows, column)) is not None:
        raise ValueError(f"{source}: {_why_no_text(rows[odd][column], odd, column)}")
    return rows


def _why_no_text(value: Any, row: int, column: str) -> str:
    where = f"in row {row} (counted from 0)"
    if value is None or value == "":
        what = "missing" if value is None else "empty"
        beginning = "to start from nothing, write the model's beginning-of-text token"
        return f"{column} {where} is {what} ({beginning})"
    if value == []:
        return f"{column} {where} {NO_MESSAGES}"
    kinds = {bool: "true or false", int: "a number", float: "a number"}
    kinds |= {list: "a list", dict: "an object"}
    kind = kinds.get(type(value), f"of type {type(value).__name__}")
    return f"{column} {value!r:.60} {where} is {kind}, not text"


def _read(path: Path, kind: str, column: str) -> Dataset:
    """The rows of a file; raises ValueError where it cannot be read as what its name says."""
    level = get_verbosity()
    try:
        if kind == "csv":
            return exact_dataset(read_csv(path, column))
        if kind == "json":
            return exact_dataset(read_json(path, column))
        set_verbosity(logging.CRITICAL)  # `datasets` logs the errors that it raises
        name = glob.escape(str(path))
        rows = datasets.load_dataset(kind, data_files=name, split="train")
        rows.data.validate(full=True)  # its text is UTF-8
        return rows
    except (DatasetGenerationError, ValueError) as error:
        told = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        reason = str(told or error).splitlines()[0]
        # what `datasets` says of a file that is well-formed and has no rows
        if "corresponds to no data" in reason or "BatchSize must be greater" in reason:
            raise ValueError(f"{path} has no rows") from error
        if isinstance(error, UnicodeDecodeError) or "Invalid UTF8" in reason:
            raise ValueError(f"{path} is not UTF-8 ({reason}): save it as UTF-8") from error
        ending = path.suffix[1:].lower()
        raise ValueError(f"{path} cannot be read as {ending}: {reason}") from error
    finally:
        set_verbosity(level)


def holds_chats(rows: Dataset, column: str) -> bool:
    """Whether `column` holds conversations, not texts; the first row decides."""
    first = rows[0][column]
    return isinstance(first, list) and bool(first) and isinstance(first[0], dict)


def split_prompts(rows: Dataset, column: str, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """The rows without, and those with, a random `share` of the different prompts, in order.

    All rows of a prompt are on one side. Raises ValueError if there is only one prompt.
    """
    texts = [str(value) for value in rows[column]]
    different = list(dict.fromkeys(texts))
    if len(different) < 2:
        raise ValueError("all prompts are the same: none can be held out")
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {different[k] for k in order[: max(1, round(share * len(different)))]}
    sides = ([i for i, text in enumerate(texts) if (text in held_out) == side] for side in (0, 1))
    train, evaluated = (rows.select(side) for side in sides)
    return train, evaluated


def fingerprint(rows: Dataset) -> str:
    """A hash of all values in their order, whatever file they are from."""
    digest, stored = hashlib.sha256(), rows.with_format("arrow")  # as stored: no image is decoded
    for start in range(0, len(rows), 10_000):
        part = stored[start : start + 10_000].to_pydict()
        digest.update(json.dumps(part, default=str).encode())
    return digest.hexdigest()


def _not_text(rows: Dataset, column: str) -> int | None:
    """The first row whose `column` is empty or no text; None if there is none."""
    kind: Any = rows.features[column]
    if not (isinstance(kind, Value) and kind.dtype in ("string", "large_string")):
        odd = (i for i, value in enumerate(rows[column]) if not isinstance(value, str) or not value)
        return next(odd, None)
    sizes = pyarrow.compute.binary_length(rows.data.column(column))
    empty = pyarrow.compute.equal(sizes.fill_null(0), 0)
    first = pyarrow.compute.index(empty, True).as_py()
    return None if first < 0 else first


def wordless(rows: Dataset, column: str) -> list[str]:
    """The texts of `column` without a letter or a digit: a tokenizer may make nothing of them."""
    texts = rows.data.column(column)
    words = pyarrow.compute.match_substring_regex(texts, r"[\pL\pN]")
    return texts.filter(pyarrow.compute.invert(words)).unique().to_pylist()


def indices_at(step: int, count: int, total: int, seed: int) -> list[int]:
    """The rows of step `step` (from 0): `count` of `total`, shuffled, each row once per epoch.

    Depends on its arguments alone, so that resuming needs no state.
    """
    positions = range(step * count, (step + 1) * count)
    return [_shuffled(k // total, total, seed)[k % total] for k in positions]


@lru_cache(maxsize=2)
def _shuffled(epoch: int, total: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(total, generator=generator).tolist()
