"""Writes the tables of docs/rules.md from the rules: `python -m scripts.rules_tables`."""

from pathlib import Path

from adaptiverl.optim.constants import CONSTANTS
from adaptiverl.optim.rules import RULES, readers

BEGIN, END = "<!-- rules: written by python -m scripts.rules_tables -->\n", "<!-- end -->\n"


def tables() -> str:
    """One table of the rules, and one of their constants."""
    text = "| argument | rule | moves | reads | kind | formula |\n|---|---|---|---|---|---|\n"
    for r in RULES:
        text += (
            f"| `{r.argument}` | `{r.name}` | {r.moves} | {r.reads} | {r.kind} | {r.formula} |\n"
        )
    text += "\n| constant | default | range | meaning | read by |\n|---|---|---|---|---|\n"
    for name, c in CONSTANTS.items():
        by = ", ".join(f"`{reader}`" for reader in readers(name)) or "all"
        text += f"| `{name}` | {c.shown} | {c.range} | {c.meaning} | {by} |\n"
    return text


def page(text: str) -> str:
    """`text` with new tables between its two markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + tables() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    path = Path("docs/rules.md")
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
