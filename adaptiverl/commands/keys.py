"""All keys of config.json: a table, docs/config.md, a JSON schema, from their one declaration."""

import inspect
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


SECTIONS = {  # of docs/config.md, by the first key of each
    "MODEL": "The model",
    "TRAIN_FILE": "Prompts",
    "REWARDS": "Rewards",
    "BATCH_SIZE": "Sampling",
    "BASELINE": "REINFORCE",
    "OPTIM": "The optimizer and its learning rate",
    "STEPS": "The length of a run",
    "OUTPUT_DIR": "What a run writes",
}
PAGE = """# Config

After this page you can look up any key. It is written by `python -m adaptiverl keys --markdown`,
from the declarations that check a config. `config.json` sets some of these keys to other values
than their defaults.

- A config is JSON with comments, or YAML. Strings are read as what they stand for: `"5e-5"` is a
  number.
- A relative path begins in the folder in which the run is started, and `~` is your home folder.
- `KEY=VALUE` on the command line wins over the file. Values there are JSON, or plain strings.
- A required key that is missing, an unknown key, and keys that contradict each other are refused.
- `config.schema.json`, which `make train` writes, lets editors complete and check a config.
"""


def markdown() -> str:
    """docs/config.md: the same keys, in sections."""
    lines = [PAGE.rstrip()]
    for name in RunConfig.model_fields:
        if name in SECTIONS:
            lines += [f"## {SECTIONS[name]}", "", *_HEAD]
        if name != "SCHEMA":
            lines.append(_line(RunConfig, name))
    lines = [f"\n{line}" if line.startswith("## ") else line for line in lines]
    lines += ["\n## Each entry of REWARDS and HELD_OUT", "", *_HEAD, "| `TYPE` | required | "]
    lines[-1] += ", ".join(f"`{kind.model_fields['type'].default}`" for kind in REWARD_TYPES) + " |"
    lines += [_line(Reward, name) for name in Reward.model_fields if name != "type"]
    for kind in REWARD_TYPES:
        own = [_line(kind, name) for name in kind.model_fields if name not in Reward.model_fields]
        score = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        lines += ["", f"### {kind.model_fields['type'].default}", "", score, "", *_HEAD, *own]
    return "\n".join(lines) + "\n"


BAR = "\\|"  # in a cell of a table
_HEAD = ["| key | default | meaning |", "|---|---|---|"]


def _line(model: type[BaseModel], name: str) -> str:
    meaning, default = _meaning(model, name), default_text(model.model_fields[name])
    return f"| `{name.upper()}` | `{default}` | {meaning.replace('|', BAR)} |"


def _rows(model: type[BaseModel], without: set[str]) -> str:
    rows = [
        (name.upper(), default_text(field), _meaning(model, name))
        for name, field in model.model_fields.items()
        if name not in without
    ]
    return tabulate(
        rows, ("key", "default", "meaning (and choices)"), tablefmt="simple", disable_numparse=True
    )


def _meaning(model: type[BaseModel], name: str) -> str:
    field = model.model_fields[name]
    trains = issubclass(model, Reward) and name.upper() in model.training_keys
    return f"{field.description}{'; not in HELD_OUT' * trains}{_choices(field.annotation)}"


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
