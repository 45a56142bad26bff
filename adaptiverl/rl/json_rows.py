"""The columns of a .json or .jsonl file, with each value as Python reads it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NO_SPACE = re.compile(r"[^ \t\r\n]")


def read_json(path: Path, column: str) -> dict[str, list[Any]]:
    """The values of each column: of objects, or of texts, which are those of `column`.

    The file holds one list of them, or one after the other. Raises ValueError, which says the line
    or the row.
    """
    found = list(_values(path.read_text(encoding="utf-8-sig")))
    rows = found[0] if len(found) == 1 and isinstance(found[0], list) else found
    rows = [{column: row} if isinstance(row, str) else row for row in rows]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"row {number} (counted from 0) is {json.dumps(row):.40}, and must be an object, "
                f'such as {{"{column}": "This"}}'
            )
    if len(rows) == 1 and column not in rows[0]:
        lists = [key for key, value in rows[0].items() if isinstance(value, list)]
        if lists:
            raise ValueError(f"the rows are in {lists[0]!r}: make that list the whole file")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _values(text: str) -> Iterator[Any]:
    """The JSON values in `text`, between which there is nothing but space."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    end = 0
    while begin := NO_SPACE.search(text, end):
        place = begin.start()
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, place) + 1  # where the value begins
            why = str(error)
            if isinstance(error, json.JSONDecodeError):
                why = error.msg
                if text[place] == "[":
                    line = error.lineno
            raise ValueError(f"line {line}: {why}") from error
        yield value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice in one object")
    return values
