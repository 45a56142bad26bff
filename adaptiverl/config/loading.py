"""From a config file to a Config: JSON with comments or YAML, KEY=VALUE, mistakes in its words."""

import difflib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from adaptiverl.config.schema import RENAMED, Config, ConfigError

ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, schema: type[ConfigT]
) -> ConfigT:
    """The config at `path` with KEY=VALUE `overrides`; a VALUE that is no JSON is a string.

    A name that ends in .yaml or .yml is YAML, any other JSON with comments.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    is_yaml = Path(path).suffix in (".yaml", ".yml")
    values = _read_yaml(path, text) if is_yaml else _read_json(path, text)
    if not isinstance(values, dict):
        what = "keys with their values, KEY: value" if is_yaml else "one JSON object, { ... }"
        raise ConfigError(f"{path} must hold {what}")
    typed: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not KEY=VALUE")
        if not key:
            raise ConfigError(f"{override!r} has no key before =")
        if key != key.strip():
            raise ConfigError(f"{override!r}: leave out the spaces around =")
        try:
            typed[key] = json.loads(value)
        except json.JSONDecodeError:
            typed[key] = value
    for place, given in ((str(path), values), ("the command line", typed)):
        for key, value in given.items():
            try:
                json.dumps({key: value}, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"{place}: {key} is not UTF-8: {error.reason}") from error
    try:
        return schema.model_validate(values | typed, by_alias=True, by_name=False)
    except ValidationError as error:
        said_at: dict[str, list[str]] = {str(path): []}  # place → what is wrong there
        for each in error.errors():
            if not _is_of_another_kind(each):
                said_at.setdefault(_place(each, path, typed), []).append(_explain(each, schema))
        parts = [f"{place}: " + "; ".join(wrong) for place, wrong in said_at.items() if wrong]
        raise ConfigError("; ".join(parts)) from error


def _read_json(path: str | Path, text: str) -> Any:
    """What a file of JSON with comments holds."""
    with suppress(ValueError):  # without them, as a program writes it: a hundred times faster
        return json.loads(text, object_pairs_hook=_distinct)
    import json5  # 20 ms, which a config without comments need not wait for

    try:
        read = json5.loads(text, allow_duplicate_keys=False) if text.strip() else None
        return json.loads(json.dumps(read))  # joins the halves of "\ud83d\ude00": json5 does not
    except ValueError as error:
        raise ConfigError(f"{path}{_said_by_json5(str(error))}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("json5 says which key is given twice")
    return values


def _read_yaml(path: str | Path, text: str) -> Any:
    """What a YAML file holds."""
    from adaptiverl.config.yaml12 import loads  # 30 ms, which a config in JSON need not wait for

    try:
        return json.loads(json.dumps(loads(text)))  # an alias may stand inside of what it names
    except ValueError as error:
        raise ConfigError(f"{path}, {error}") from error


def _said_by_json5(message: str) -> str:
    """One of json5's messages, like `<string>:3 Unexpected "}" at column 2`, in words."""
    if found := re.fullmatch(r'<string>:(\d+) Unexpected "(.*)" at (column \d+)', message, re.S):
        line, sign, column = found.groups()
        missing = "a quote" if sign == "\n" else "a comma" if sign in '"{[' else None
        hint = f"; is {missing} missing before it?" if missing else ""
        return f", line {line}: unexpected {sign!r} at {column}{hint}"
    if found := re.fullmatch(r"<string>:(\d+) Unexpected end of input .*", message):
        return f", line {found[1]}: the file ends too early; is a bracket or a quote not closed?"
    if found := re.fullmatch(r'Duplicate key "(.*)" found in object', message, re.S):
        return f": {found[1]} is given twice"
    return f": {message}"


def _place(error: Any, path: str | Path, typed: dict[str, Any]) -> str:
    """Who gave the value that is wrong; keys that contradict each other may be of both."""
    if not typed or (error["loc"] and error["loc"][0] not in typed):
        return str(path)
    return "the command line" if error["loc"] else f"{path} and the command line"


# What pydantic adds to a place for each type that a value may have: LRATE, LORA_TARGETS, WEIGHT
WORDS = ("literal['auto']", "literal['all-linear']")
NUMBER, POINTS = "float", "list[tuple[int, float]]"
KINDS = (*WORDS, "constrained-float", "list[str]", NUMBER, POINTS)


ENTRY = '{"TYPE": "classifier"}'
PAIRS = {  # keys of rewards that hold pairs of numbers
    "WEIGHT": "each point of WEIGHT is [step, weight]",
    "CLIP": "give two numbers, [low, high]",
}
PATTERNS = {  # what is to be written where a key's pattern is not met
    "FUNCTION": "module:function, for example my_rewards:praise",
    "VLLM_SERVER": "an address, for example http://localhost:8000",
    "BASE_URL": "an address, for example http://localhost:8000/v1",
}


def _is_of_another_kind(error: Any) -> bool:
    """Whether it says only that a value is not such a word, or no list, or no number but a list."""
    kind = error["loc"][-1] if error["loc"] else None
    is_list = isinstance(error["input"], list)
    return kind in WORDS or (kind == POINTS and not is_list) or (kind == NUMBER and is_list)


def _explain(error: Any, schema: type[Config]) -> str:
    """One of pydantic's errors in the words of the config file."""
    where = [str(part) for part in error["loc"] if part not in KINDS]
    rewards = _kinds(schema)
    owner: type[BaseModel] = schema
    if len(where) > 2 and where[0] in ("REWARDS", "HELD_OUT") and where[2] in rewards:
        owner = rewards[where.pop(2)]  # REWARDS, 0, regex, PATTERNS
    kind, name = error["type"], ".".join(where)
    given = f"{name} is {json.dumps(error['input'])}"
    if kind == "extra_forbidden":
        if owner is schema and name in RENAMED:
            return f"{name} is now {RENAMED[name]}"
        fields = owner.model_fields.items()
        keys = {(f.alias or key).upper(): f.alias or key for key, f in fields if key != "type"}
        near = difflib.get_close_matches(where[-1].upper(), keys, n=1, cutoff=0)
        return f"unknown key {name}; the nearest is {keys[near[0]]}"
    if kind == "union_tag_invalid":
        return f"{name}: TYPE is one of {', '.join(rewards)}, not {error['ctx']['tag']!r}"
    if kind == "union_tag_not_found":
        return f"{name}: a reward needs a TYPE, one of {', '.join(rewards)}"
    if kind == "model_attributes_type":
        return f"{given}: each reward is an object, for example {ENTRY}"
    if kind == "list_type" and name in ("REWARDS", "HELD_OUT"):
        return f"{given}: it must be a list, for example [{ENTRY}]"
    is_pair = kind in ("tuple_type", "too_long", "missing")
    if is_pair and (hint := PAIRS.get(".".join(where[2:3]))):
        place = where[:-1] if kind == "missing" else where
        return f"{'.'.join(place)} is {json.dumps(error['input'])}: {hint}"
    if kind == "missing":
        return f"{name} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return message
    if kind == "value_error":
        return f"{name}: {message}"
    if kind == "empty":
        return f"{name} is empty"
    if kind == "string_pattern_mismatch" and (hint := PATTERNS.get(where[-1])):
        return f"{given}: write {hint}"
    message = re.sub(", unable to parse string as an? [a-z]+", "", message)
    message = message.replace("Input should be", "it must be").replace("String should", "it must")
    if kind == "list_type" and isinstance(error["input"], str):
        typed = error["input"].replace("\\n", "\n")  # a shell passes \n as two characters
        message += f", such as {json.dumps([typed] if typed else [])}"
    return f"{given}: {message}"


def _kinds(schema: type[Config]) -> dict[str, type[BaseModel]]:
    """The class of each reward that REWARDS may hold, by its TYPE."""
    (entry,) = get_args(schema.model_fields["REWARDS"].annotation)  # list[Annotated[A | B, …]]
    return {kind.model_fields["type"].default: kind for kind in get_args(get_args(entry)[0])}
