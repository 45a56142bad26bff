"""A data set that gives back exactly the values that it was made from, of mixed kinds too."""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow
from datasets import Dataset, DatasetInfo, Features, Json, Value
from datasets.table import InMemoryTable

KINDS = {
    str: pyarrow.large_string(), bool: pyarrow.bool_(), int: pyarrow.int64(),
    float: pyarrow.float64(),
}  # fmt: skip


@dataclass
class _ExactJson(Json):
    """Json as Python reads it: that of `datasets` loses NaN, long integers and last digits."""

    def decode_example(self, example_data: Any, token_per_repo_id: Any = None) -> Any:
        return None if example_data is None else json.loads(example_data)


def exact_dataset(columns: dict[str, list[Any]]) -> Dataset:
    """The `columns`, whose values are any that JSON has; raises ValueError for half a character."""
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = _array(values)
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            texts = (json.dumps(value, ensure_ascii=False) for value in values)
            row = next(row for row, text in enumerate(texts) if half in text)
            raise ValueError(
                f"row {row} (counted from 0) of column {name!r} has half of a character, {half!a}"
            ) from error
    features = Features(
        {
            name: _ExactJson() if array.type == pyarrow.json_() else Value(str(array.type))
            for name, array in arrays.items()
        }
    )
    return Dataset(InMemoryTable(pyarrow.table(arrays)), info=DatasetInfo(features=features))


def _array(values: list[Any]) -> pyarrow.Array:
    """A column of one simple kind as such, any other as JSON: Arrow would make all of one kind."""
    kinds = {type(value) for value in values if value is not None} or {str}
    if len(kinds) == 1 and (kind := KINDS.get(kinds.pop())):
        try:
            return pyarrow.array(values, kind)
        except OverflowError:  # an integer of more than 64 bits
            pass
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(texts, "string"))
