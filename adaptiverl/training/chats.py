"""What is checked of conversations before the policy loads: template, SYSTEM, and lengths.

Each function raises ConfigError.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from adaptiverl.config.schema import ConfigError
from adaptiverl.rl.chat import PromptError, given_prompt, tokenize
from adaptiverl.rl.data import holds_chats
from adaptiverl.rl.sampling.sampler import too_long
from adaptiverl.training.inputs import as_config_error
from adaptiverl.training.keys import RunConfig

MARKUP = 1000  # tokens, more than a template adds to a conversation


def use_chat_template(c: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer the template of CHAT_TEMPLATE, which checkpoints then have."""
    if c.CHAT_TEMPLATE:
        with as_config_error("CHAT_TEMPLATE"):
            tokenizer.chat_template = Path(c.CHAT_TEMPLATE).read_text(encoding="utf-8")


def check_chats(
    c: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[str, Dataset],
    max_prompt: int | None,
) -> None:
    """Looks at all of `files`, prompts by the name of their source; texts need nothing of this.

    One conversation of each sequence of roles is rendered, because templates refuse some; those
    that may be longer than `max_prompt` tokens are counted.
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
        seen: set[tuple[str, ...]] = set()
        for number, found in enumerate(rows[c.PROMPT_COLUMN]):
            prompt: Any = given_prompt(found, c.SYSTEM)
            roles = tuple(message["role"] for message in prompt)
            size = len(str(prompt).encode()) + MARKUP  # a token has one byte or more
            if roles in seen and not (max_prompt and size > max_prompt):
                continue
            seen.add(roles)
            try:
                tokens = len(tokenize(tokenizer, [prompt]).input_ids[0])
            except PromptError as error:
                raise ConfigError(f"{source}: row {number}: {error}") from error
            if max_prompt and tokens > max_prompt:
                raise ConfigError(f"{source}: row {number}: {too_long(tokens, max_prompt)}")
