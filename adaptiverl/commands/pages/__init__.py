"""The pages that commands write, from the templates beside this file: one file, nothing loaded."""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from adaptiverl.commands.written import write_whole

HERE = Path(__file__).parent


@cache  # it keeps the templates that it has compiled
def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    return made


def write_page(template: str, out: Path, values: dict[str, Any]) -> Path:
    """Renders `template` to `out`, which is there whole or as it was before. Text is escaped."""
    style, script = ((HERE / name).read_text("utf-8") for name in ("style.css", "page.js"))
    # The browser runs this script alone, whatever a sample says
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {
        "style": Markup(style),
        "script": Markup(script),
        "script_hash": Markup(f"sha256-{digest}"),
    }
    text = environment().get_template(template).render(values | own)
    write_whole(out, text)
    return out


def is_page(path: Path) -> bool:
    """Whether a command has written it: its end says so."""
    return b"Written by <code>adaptiverl " in path.read_bytes()
