"""A config file as it is read: comments, KEY=VALUE overrides, and mistakes in the file's words."""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from adaptiverl.run.config import REWARD_KEYS, Config, UserError
from adaptiverl.run.reward_config import REWARD_KINDS


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config at `path` with KEY=VALUE `overrides`; a VALUE that is no JSON is a string."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        values = json.loads(strip_comments(text), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one JSON object, {{ ... }}")
    typed: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is not KEY=VALUE")
        try:
            typed[key] = json.loads(value)
        except json.JSONDecodeError:
            typed[key] = value
    try:
        return Config.model_validate(values | typed)
    except ValidationError as error:
        said: dict[str, list[str]] = {str(path): []}  # place → what is wrong there
        for each in error.errors():
            if not _is_of_another_kind(each):
                said.setdefault(_place(each, path, typed), []).append(_explain(each))
        parts = [f"{place}: " + "; ".join(wrong) for place, wrong in said.items() if wrong]
        raise UserError("; ".join(parts)) from error


def _place(error: Any, path: str | Path, typed: dict[str, Any]) -> str:
    """Who gave the value that is wrong; keys that contradict each other may be of both."""
    if not typed or (error["loc"] and error["loc"][0] not in typed):
        return str(path)
    return "the command line" if error["loc"] else f"{path} and the command line"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise UserError(f"the config says {twice.pop()} twice")
    return dict(pairs)


def strip_comments(text: str) -> str:
    """JSON without // and /* */ comments and trailing commas; line numbers stay."""
    string = r'"(?:\\.|[^"\\])*"'

    def blank(match: re.Match) -> str:
        found = match.group()
        return found if found.startswith('"') else "\n" * found.count("\n")

    text = re.sub(rf"{string}|//[^\n]*|/\*.*?\*/", blank, text, flags=re.DOTALL)
    return re.sub(
        rf"{string}|,(?=\s*[}}\]])", lambda m: "" if m.group() == "," else m.group(), text
    )


# What pydantic adds to a place for each kind that a value may be of: LRATE, WEIGHT
KINDS = ("literal['auto']", "constrained-float", "float", "list[tuple[int, float]]")


def _is_of_another_kind(error: Any) -> bool:
    """Whether it says only that a value is not "auto", or no list, or no number but a list."""
    kind = error["loc"][-1] if error["loc"] else None
    is_list = isinstance(error["input"], list)
    return kind == KINDS[0] or (kind == KINDS[3] and not is_list) or (kind == KINDS[2] and is_list)


def _explain(error: Any) -> str:
    """One of pydantic's errors in the words of the config file."""
    where = [str(part) for part in error["loc"] if part not in KINDS]
    kinds = {get_args(kind.model_fields["TYPE"].annotation)[0]: kind for kind in REWARD_KINDS}
    kind = kinds.get(where[2]) if len(where) > 2 and where[0] in REWARD_KEYS else None
    if kind:
        del where[2]
    name = ".".join(where)
    if error["type"] == "extra_forbidden":
        fields = (kind or Config).model_fields
        keys = {(field.alias or key).upper(): field.alias or key for key, field in fields.items()}
        near = difflib.get_close_matches(where[-1].upper(), keys, n=1, cutoff=0)
        return f"unknown key {name}; the nearest is {keys[near[0]]}"
    if error["type"] == "union_tag_invalid":
        return f"{name}: TYPE is one of {', '.join(kinds)}, not {error['ctx']['tag']!r}"
    if error["type"] == "union_tag_not_found":
        return f"{name}: a reward needs a TYPE, one of {', '.join(kinds)}"
    if error["type"] == "missing":
        return f"{name} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return message
    if error["type"] == "value_error":
        return f"{name}: {message}"
    return f"{name} is {json.dumps(error['input'])}: {message[0].lower()}{message[1:]}"
