"""The columns of a .csv file, with each value as it was written.

Libraries guess the kind of a column from its beginning, and make 7 of 007 and nothing of NA.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # of 64 bits
DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?")
SAID = {  # of errors of `csv`, in words that say what to do
    "unexpected end of data": "a quote is not closed",
    "',' expected after '\"'": 'a quote within quotes is written twice: "He said ""no"""',
}
csv.field_size_limit(2**31 - 1)  # a prompt may be longer than the usual 128 KiB


def read_csv(path: Path, column: str) -> dict[str, list[Any]]:
    """The values of each column: texts, None where a field is empty.

    A column but `column`, the prompts, is of numbers if all its values are plain ones, such as 12
    and -0.5. Raises ValueError, which says the line.
    """
    records = list(_records(path))
    if not records:
        return {}
    # As pandas calls the column of its index, which has no name
    names = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(records[0])]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"line 1: two columns have the name {twice[0]!r}")
    texts = {
        name: [text or None for text in values]
        for name, (_, *values) in zip(names, zip(*records, strict=True), strict=True)
    }
    return {name: v if name == column else _as_numbers(v) for name, v in texts.items()}


def separator_hint(line: str) -> str | None:
    """What to say where no comma, but something else, seems to separate the names in `line`."""
    words = {";": ";", "\t": "tabs", "|": "|"}
    for sign, word in words.items():
        if sign in line:
            return f"columns are separated by commas, and this file seems to use {word}"
    return None


def _records(path: Path) -> Iterator[list[str]]:
    """The fields of each record, the names first; blank lines, also of spaces, are none."""
    first: list[str] = []
    end = 0
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, strict=True)
        try:
            for fields in lines:
                begin, end = end + 1, lines.line_num
                if not fields or (len(fields) == 1 and fields[0].isspace()):
                    continue
                first = first or fields
                if len(fields) != len(first):
                    raise ValueError(f"line {begin} has {_misfit(fields, first)}")
                yield fields
        except csv.Error as error:
            raise ValueError(f"line {end + 1}: {SAID.get(str(error), str(error))}") from error


def _misfit(fields: list[str], first: list[str]) -> str:
    """How many `fields` there are, for how many names in the `first` record, and what to do."""
    count, named = len(fields), len(first)
    hint = "an empty field has its comma, too"
    if count > named:
        hint = 'put a text that has a comma in it into quotes, "like, this"'
    if named == 1:
        hint = separator_hint(first[0]) or hint
    return f"{count} field{'s' * (count != 1)}, and the first line names {named}: {hint}"


def _as_numbers(texts: list[str | None]) -> list[Any]:
    """Integers, or else floats, where no text of a column would lose anything; else the texts."""
    if all(text is None or INTEGER.fullmatch(text) for text in texts):
        return [None if text is None else int(text) for text in texts]
    if all(text is None or _is_exact(text) for text in texts):
        return [None if text is None else float(text) for text in texts]
    return texts


def _is_exact(text: str) -> bool:
    """Whether it is a decimal that a float keeps all digits of."""
    return bool(DECIMAL.fullmatch(text)) and Decimal(repr(float(text))) == Decimal(text)
