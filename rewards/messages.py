"""Prompts and completions as plain text, whether they come as strings or as lists of messages."""

from collections.abc import Iterable, Sequence
from typing import Any

Text = str | Sequence[dict[str, Any]]  # messages are {"role": …, "content": …}
Texts = Sequence[Text]


def text_of(item: Text) -> str:
    """The string itself, or the contents of its messages, one per line.

    What a tool returned is left out: nobody wrote it. A content may be a string, None, or a list
    of parts, of which the texts are read.
    """
    if isinstance(item, str):
        return item
    return "\n".join(_content(message) for message in item if message.get("role") != "tool")


def texts_of(items: Texts) -> list[str]:
    """Raises TypeError for a single text, whose letters would be scored."""
    if isinstance(items, str):
        raise TypeError(f"{items!r:.60} is one text; give a list of texts, such as ['a text']")
    return [text_of(item) for item in items]


def transcript(prompt: Text) -> str:
    """For people and judges: `text_of` a single message, several as lines `role: content`."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return text_of(prompt)
    return "\n".join(f"{message.get('role')}: {_content(message)}" for message in prompt)


def transcripts_of(prompts: Texts) -> list[str]:
    return [transcript(prompt) for prompt in prompts]


def joined(prompt: Text, completion: Text) -> str:
    """The completion after its prompt; messages begin on a new line."""
    between = "" if isinstance(completion, str) else "\n"
    return text_of(prompt) + between + text_of(completion)


def encodable(texts: Iterable[str]) -> list[str]:
    """Half of a character, which UTF-8 cannot have, becomes its escape, as in the logs."""
    return [text.encode("utf-8", "backslashreplace").decode("utf-8") for text in texts]


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)
