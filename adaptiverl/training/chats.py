"""What is checked of conversations before the policy loads: template, SYSTEM, and lengths.

Each function raises ConfigError.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from adaptiverl.config.schema import ConfigError
from adaptiverl.rl.chat import PromptError, given_prompt, render, tokenize
from adaptiverl.rl.data import holds_chats
from adaptiverl.rl.sampling.sampler import too_long
from adaptiverl.training.inputs import as_config_error
from adaptiverl.training.keys import RunConfig


def use_chat_template(c: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer the template of CHAT_TEMPLATE, which checkpoints then have."""
    if not c.CHAT_TEMPLATE:
        return
    with as_config_error(f"CHAT_TEMPLATE {c.CHAT_TEMPLATE}"):
        tokenizer.chat_template = Path(c.CHAT_TEMPLATE).read_text(encoding="utf-8")
        if not tokenizer.chat_template.strip():
            raise ValueError("the file is empty")
        try:
            render(tokenizer, [{"role": "user", "content": "A question?"}])
        except PromptError as error:  # of these turns; what it says of the run's prompts is told
            if isinstance(broken := error.__cause__, TemplateSyntaxError):
                raise ValueError(f"line {broken.lineno}: {broken.message}") from error


def check_chats(
    c: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[str, Dataset],
    max_prompt: int | None,
) -> None:
    """Looks at all of `files`, prompts by the name of their source; texts need nothing of this.

    Each conversation is rendered, because templates refuse some; those that may be longer than
    `max_prompt` tokens are counted.
    """
    chats = {source: rows for source, rows in files.items() if holds_chats(rows, c.PROMPT_COLUMN)}
    if texts := files.keys() - chats.keys():
        for key in ("SYSTEM", "CHAT_TEMPLATE"):
            if getattr(c, key) is not None:
                raise ConfigError(
                    f"{key} is for conversations, and {min(texts)} has prompts as text: write each "
                    'as [{"role": "user", "content": …}]'
                )
    if chats and not tokenizer.chat_template:
        raise ConfigError(
            f"MODEL {c.MODEL} has no chat template, which the messages of {next(iter(chats))} "
            "need: name a chat model, or a file with a template in CHAT_TEMPLATE"
        )
    for source, rows in chats.items():
        for number, found in enumerate(rows[c.PROMPT_COLUMN]):
            place = f"{source}: row {number} (counted from 0)"
            prompt: Any = given_prompt(found, c.SYSTEM)
            try:
                text = render(tokenizer, prompt)
            except PromptError as error:
                raise ConfigError(f"{place}: {error}") from error
            # a token has one byte or more
            if not max_prompt or len(text.encode()) <= max_prompt:
                continue
            if (tokens := len(tokenize(tokenizer, [prompt]).input_ids[0])) > max_prompt:
                raise ConfigError(f"{place}: {too_long(tokens, max_prompt)}")
