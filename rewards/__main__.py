"""`python -m rewards` writes the table of rewards into README.md, from their declarations."""

import inspect
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from rewards import REWARD_TYPES, Reward

BEGIN, END = "<!-- rewards: written by `python -m rewards` -->", "<!-- end of rewards -->"


def table() -> str:
    """The table as Markdown, one line per TYPE: its own keys and what its score is."""
    lines = ["| TYPE | keys | score |", "|---|---|---|"]
    for kind in REWARD_TYPES:
        own = {k: f for k, f in kind.model_fields.items() if k not in Reward.model_fields}
        keys = ", ".join(_key(name, field) for name, field in own.items())
        score = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| `{kind.model_fields['type'].default}` | {keys} | {score} |")
    return "\n".join(lines)


def _key(name: str, field: FieldInfo) -> str:
    """The key, with the values that it may have where these are words."""
    key = f"`{name.upper()}`"
    if get_origin(field.annotation) is Literal:
        key += f" ({', '.join(f'`{value}`' for value in get_args(field.annotation))})"
    return key


def with_table(text: str) -> str:
    """`text` with the table between its markers."""
    inside = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?=\n{re.escape(END)})", re.DOTALL)
    return inside.sub(lambda _: table(), text)


if __name__ == "__main__":
    readme = Path("README.md")
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
