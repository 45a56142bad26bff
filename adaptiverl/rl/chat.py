"""Prompts as conversations, in TRL's format: lists of {"role": …, "content": …}.

They become text by the tokenizer's chat template. Leaves out tools and images.
"""

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
Prompt = str | list[Message]
NO_MESSAGES = "is a conversation without messages"
ANSWERED = "messages"  # TRL's column of whole conversations, whose last message is the answer


class PromptError(Exception):
    """A prompt that the model cannot be given: which one, and why."""


def readable(prompt: Prompt) -> str:
    """Text as it is; a conversation as lines `role: content`, without the template's markup."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_text(message)}" for message in prompt)


def completion_of(prompt: Prompt, text: str) -> Prompt:
    """The completion as TRL hands it to rewards: of a conversation, a list of one message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def given_prompt(prompt: Prompt, system: str | None) -> Prompt:
    """What the model is given: text as it is; a conversation without its answer, after `system`.

    Keys without a value, with which `datasets` makes all messages alike, are left out.
    """
    if isinstance(prompt, str):
        return prompt
    asked = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
    asked = [
        {key: value for key, value in message.items() if value is not None or key == "content"}
        for message in asked
    ]
    if system is not None and asked[0]["role"] != "system":
        asked = [{"role": "system", "content": system}, *asked]
    return asked


def mistake(prompt: Any, column: str) -> str | None:
    """Why `prompt`, a value of `column`, is no conversation to complete; None if it is one."""
    if prompt == []:
        return NO_MESSAGES
    if not isinstance(prompt, list) or not all(map(_is_message, prompt)):
        return f'is {prompt!r}, not a list of messages {{"role": …, "content": …}}'
    for message in prompt:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if odd := [part for part in parts if part.get("type") != "text"]:
            return f"has a content of type {odd[0].get('type')!r}: only text can be read"
        if not (isinstance(content, str | list) or message.get("tool_calls")):
            return f"has a message of the {message['role']} without content"
    if prompt[-1]["role"] == "assistant":
        if column != ANSWERED:
            return (
                "ends with the assistant's message, and it is not clear whether that is to be "
                "answered, continued or left out: let each prompt end with the user's message (in "
                f"a column {ANSWERED!r}, named by PROMPT_COLUMN, the last answer is left out)"
            )
        prompt = prompt[:-1]
    if not prompt or prompt[-1]["role"] in ("system", "assistant"):
        return "has no message to answer before the assistant's turn"
    return None


def render(tokenizer: Any, prompt: Prompt) -> str:
    """The text that the tokenizer reads: that of the chat template, up to the assistant's turn.

    It has the template's own beginning-of-text token. Raises PromptError.
    """
    if isinstance(prompt, str):
        return prompt
    return _by_template(tokenizer, prompt, add_generation_prompt=True)


def tokenize(tokenizer: Any, prompts: Sequence[Prompt], **options: Any) -> Any:
    """The tokenizer's batch of prompts that are all texts or all conversations; see `render`.

    A text that begins with the beginning-of-text token is not given a second one.
    """
    chat = not isinstance(prompts[0], str)
    # the template has written the special tokens
    texts = [render(tokenizer, each) for each in prompts]
    if not chat and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:  # it adds its own
        texts = [text.removeprefix(tokenizer.bos_token) for text in texts]
    return tokenizer(texts, add_special_tokens=not chat, **options)


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token by which the chat template ends the assistant's turn, if there is one."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    answer = "An answer."
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        text = _by_template(tokenizer, turns)
    except PromptError:  # it wants other turns; what it says of the run's prompts is told
        return None
    _, found, after = text.rpartition(answer)
    rest = tokenizer(after, add_special_tokens=False).input_ids if found else []
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in rest if token in special), None)


def _by_template(tokenizer: Any, turns: list[Message], **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # a template is a program, which may raise anything
        roles = ", ".join(message["role"] for message in turns)
        said = " ".join(str(error).split())
        raise PromptError(f"the chat template refuses a conversation of {roles}: {said}") from error


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _text(message: Message) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)
