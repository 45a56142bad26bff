"""All keys of config.json, as a table and as a JSON schema, from their one declaration."""

import inspect
import json
import shutil
import textwrap
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from tabulate import tabulate

from adaptiverl.training.keys import RunConfig
from rewards import REWARD_TYPES, Reward

SECTIONS = {  # by the first key of each
    "MODEL": "The model",
    "TRAIN_FILE": "Prompts",
    "REWARDS": "Rewards",
    "BATCH_SIZE": "Sampling",
    "BASELINE": "REINFORCE",
    "OPTIM": "The optimizer and its learning rate",
    "STEPS": "The length of a run",
    "OUTPUT_DIR": "What a run writes",
}
HEADS = ("key", "default", "meaning (and choices)")
WIDEST = 26, 120  # characters of a default, and of the whole table
Row = tuple[str, str, str]


def schema() -> str:
    """The JSON schema of config.json."""
    return json.dumps(RunConfig.model_json_schema(by_alias=True), indent=2)


def table(words: list[str] | None = None) -> str:
    """All keys in sections, as wide as the terminal; with `words`, those that have one of them.

    The name of a section, or of a type of reward, stands for all of its keys.
    """
    found = {
        title: [row for row in rows if not words or _has((title.split(". ")[0], *row), words)]
        for title, rows in sections().items()
    }
    width = min(shutil.get_terminal_size((WIDEST[1], 0)).columns, WIDEST[1])
    names = [len(name) for rows in found.values() for name, *_ in rows]
    if not names:
        return f"no key and no meaning has {' or '.join(words or [])}"
    left = width - max(names) - WIDEST[0] - 4  # two spaces between columns
    parts = []
    for title, rows in found.items():
        if rows:
            lines = [*textwrap.wrap(title, width), ""]
            shown = tabulate(
                rows, HEADS, "simple", disable_numparse=True,
                maxcolwidths=[None, WIDEST[0], max(left, 20)],
            )  # fmt: skip
            parts.append("\n".join([*lines, shown]))
    return "\n\n".join(parts)


def sections() -> dict[str, list[Row]]:
    """Key, default and meaning of every key, by the title of its section."""
    result: dict[str, list[Row]] = {}
    for name in RunConfig.model_fields:
        title = SECTIONS[name] if name in SECTIONS else next(reversed(result), "")
        if name != "SCHEMA":
            result.setdefault(title, []).append(_row(RunConfig, name))
    kinds = ", ".join(kind.model_fields["type"].default for kind in REWARD_TYPES)
    result["Each entry of REWARDS and HELD_OUT"] = [
        ("TYPE", "required", f"What it is ({kinds})"),
        *(_row(Reward, name) for name in Reward.model_fields if name != "type"),
    ]
    for kind in REWARD_TYPES:
        score = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        own = [name for name in kind.model_fields if name not in Reward.model_fields]
        title = f'"TYPE": "{kind.model_fields["type"].default}". {score}'
        result[title] = [_row(kind, name) for name in own]
    return result


def _has(cells: tuple[str, ...], words: list[str]) -> bool:
    return any(word.lower() in cell.lower() for word in words for cell in cells)


def _row(model: type[BaseModel], name: str) -> Row:
    field = model.model_fields[name]
    only = issubclass(model, Reward) and name.upper() in model.training_keys
    meaning = f"{field.description}{'; not in HELD_OUT' * only}{_choices(field.annotation)}"
    return name.upper(), default_text(field), meaning


def _choices(annotation: Any) -> str:
    """The values that a key may have, where they are named; also inside a list or a union."""
    if get_origin(annotation) is Literal:
        values = [value for value in get_args(annotation) if isinstance(value, str)]
        return f" ({', '.join(values)})" if values else ""
    found = map(_choices, get_args(annotation))
    return next(filter(None, found), "")


def default_text(field: FieldInfo) -> str:
    """The default of a key as a config says it."""
    if field.is_required():
        return "required"
    return json.dumps(field.default, default=lambda reward: {"TYPE": reward.type})
