"""Rewards that read the completion's text alone: patterns and length."""

import logging
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import regex  # searches as `re` does, and can be told when to give up
from pydantic import BeforeValidator, Field, model_validator

from rewards.base import Column, Reward
from rewards.messages import Texts, texts_of

log = logging.getLogger(__name__)
# A brace that is no repetition is a plain character to `re`; `regex` would match approximately.
PLAIN_BRACE = re.compile(r"\\N\{[^}]*\}|\\.|\{(?!\d+\}|\d*,\d*\})", re.DOTALL)


class RegexReward(Reward):
    """1 where the completion matches, else 0; missing where a search takes longer than TIMEOUT.

    Patterns are Python's (`re`). The first search that takes too long is logged.
    """

    type: Literal["regex"] = "regex"
    patterns: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = (
        Field(
            description="One or several patterns", json_schema_extra={"type": ["array", "string"]}
        )
    )
    literal: bool = Field(False, description="Patterns are plain substrings")
    match: Literal["any", "all"] = Field("any", description="How many patterns must match")
    negate: bool = Field(False, description="Reward the absence instead")
    ignore_case: bool = Field(False, description="Upper and lower case are the same")
    timeout: float = Field(
        1.0, gt=0, description="Seconds of processor time for one pattern in one completion"
    )
    _compiled: list[tuple[str, Any]]
    _warned: bool = False

    @model_validator(mode="after")
    def _searchable(self) -> "RegexReward":
        if not self.patterns or not all(self.patterns):
            raise ValueError("PATTERNS needs at least one pattern, none of them empty")
        for pattern in self.patterns:
            self._compile(pattern)
        return self

    def _compile(self, pattern: str) -> Any:
        source = re.escape(pattern) if self.literal else pattern
        try:
            re.compile(source)  # whose errors users know, and whose syntax `regex` exceeds
            source = PLAIN_BRACE.sub(lambda m: "\\{" if m[0] == "{" else m[0], source)
            return regex.compile(source, regex.IGNORECASE if self.ignore_case else 0)
        except (re.error, regex.error) as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error

    def _load(self, device: Any) -> None:
        self._compiled = [(pattern, self._compile(pattern)) for pattern in self.patterns]

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> Column:
        self.start()
        return [self._score(text) for text in texts_of(completions)]

    def _score(self, text: str) -> float | None:
        enough = any if self.match == "any" else all
        try:
            return float(enough(self._finds(*one, text) for one in self._compiled) != self.negate)
        except TimeoutError:
            return None

    def _finds(self, pattern: str, compiled: Any, text: str) -> bool:
        try:
            return compiled.search(text, timeout=self.timeout) is not None
        except TimeoutError:
            if not self._warned:
                self._warned = True
                log.warning(
                    f"pattern {pattern!r} takes more than {self.timeout:g} s on {text[:80]!r}: "
                    "completions like it are left out. Repetitions inside of a repetition are the "
                    "usual cause"
                )
            raise


class LengthReward(Reward):
    """1 at TARGET or inside MIN…MAX, falling linearly to 0 outside.

    It reaches 0 at twice the upper limit and at length 0. Tokens are those of the policy, its EOS
    included.
    """

    type: Literal["length"] = "length"
    target: int | None = Field(None, ge=1, description="Wanted length")
    min: int | None = Field(None, ge=0, description="Shortest wanted length")
    max: int | None = Field(None, ge=1, description="Longest wanted length")
    unit: Literal["tokens", "words"] = Field("tokens", description="What is counted")

    @model_validator(mode="after")
    def _range(self) -> "LengthReward":
        if (self.target is None) == (self.min is None and self.max is None):
            raise ValueError("length takes a TARGET, or a MIN, a MAX or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"MIN {self.min} is above MAX {self.max}")
        return self

    def __call__(
        self,
        prompts: Texts,
        completions: Texts,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        if self.unit == "words":
            lengths = [len(text.split()) for text in texts_of(completions)]
        elif completion_ids is not None:
            lengths = [len(ids) for ids in completion_ids]
        else:
            raise ValueError(
                'length in tokens needs completion_ids; unit="words" counts words without them'
            )
        return [self._score(length) for length in lengths]

    def _score(self, length: int) -> float:
        low = self.target or self.min or 0
        high = self.target or self.max or float("inf")
        if length < low:
            return length / low
        return max(0.0, 2.0 - length / high) if length > high else 1.0
