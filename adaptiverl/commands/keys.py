"""All keys of config.json as a table and as a JSON schema, both from their one declaration."""

import json
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from tabulate import tabulate

from adaptiverl.training.keys import RunConfig
from rewards import REWARD_TYPES, Reward


def schema() -> str:
    """The JSON schema of config.json."""
    return json.dumps(RunConfig.model_json_schema(by_alias=True), indent=2)


def table() -> str:
    """Every key of config.json, then those of each reward, with default and meaning."""
    shared = set(Reward.model_fields)
    parts = ["Keys of config.json", _rows(RunConfig, {"SCHEMA"})]
    parts += ["", "Keys of each entry of REWARDS and HELD_OUT", _rows(Reward, {"type"})]
    for kind in REWARD_TYPES:
        name = kind.model_fields["type"].default
        parts += ["", f'Keys of "TYPE": "{name}"', _rows(kind, shared)]
    return "\n".join(parts)


def _rows(model: type[BaseModel], without: set[str]) -> str:
    rows = [
        (name.upper(), default_text(field), f"{field.description}{_choices(field.annotation)}")
        for name, field in model.model_fields.items()
        if name not in without
    ]
    return tabulate(
        rows, ("key", "default", "meaning (and choices)"), tablefmt="simple", disable_numparse=True
    )


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
