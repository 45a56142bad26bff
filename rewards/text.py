"""Rewards that read the completion's text alone: patterns and length."""

import logging
import re
from collections.abc import Sequence

import regex  # searches as `re` does, and can be told when to give up

from rewards.messages import Text, texts_of

log = logging.getLogger(__name__)
SECONDS = 1.0  # of processor time, for one pattern in one completion
# A brace that is no repetition is a plain character to `re`; `regex` would match approximately.
PLAIN_BRACE = re.compile(r"\\N\{[^}]*\}|\\.|\{(?!\d+\}|\d*,\d*\})", re.DOTALL)


class RegexReward:
    """1.0 where `match` ("any" or "all") of the patterns is found in the completion, else 0.0.

    Patterns are Python's (`re`). `literal` patterns are plain substrings; `negate` turns the answer
    round. A completion on which a pattern takes longer than SECONDS is missing (None), and that is
    said once.
    """

    def __init__(
        self,
        patterns: str | list[str],
        literal: bool = False,
        match: str = "any",
        negate: bool = False,
        ignore_case: bool = False,
    ):
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not patterns or not all(patterns):
            raise ValueError("PATTERNS needs at least one pattern, none of them empty")
        self.patterns = []
        for pattern in patterns:
            source = re.escape(pattern) if literal else pattern
            try:
                re.compile(source)  # whose errors users know, and whose syntax `regex` exceeds
                source = PLAIN_BRACE.sub(lambda m: "\\{" if m[0] == "{" else m[0], source)
                flags = regex.IGNORECASE if ignore_case else 0
                self.patterns.append((pattern, regex.compile(source, flags)))
            except (re.error, regex.error) as error:
                raise ValueError(
                    f"pattern {pattern!r} is no regular expression: {error}"
                ) from error
        if match not in ("any", "all"):
            raise ValueError(f"match is any or all, not {match!r}")
        self.enough = any if match == "any" else all
        self.negate = negate
        self.announced = False

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns
    ) -> list[float | None]:
        return [self._score(text) for text in texts_of(completions)]

    def _score(self, text: str) -> float | None:
        try:
            return float(
                self.enough(self._finds(*one, text) for one in self.patterns) != self.negate
            )
        except TimeoutError:
            return None

    def _finds(self, pattern: str, compiled: regex.Pattern, text: str) -> bool:
        try:
            return compiled.search(text, timeout=SECONDS) is not None
        except TimeoutError:
            if not self.announced:
                self.announced = True
                log.warning(
                    "pattern %r takes more than %g s on %r: completions like it are left out. "
                    "Repetitions inside of a repetition are the usual cause",
                    pattern,
                    SECONDS,
                    text[:80],
                )
            raise


class LengthReward:
    """1.0 at `target`, or from `min` to `max`, falling linearly outside and never below 0.0.

    It reaches 0 at twice the upper limit and at length 0. `unit` is tokens (of the policy, its EOS
    included) or words.
    """

    def __init__(
        self,
        target: int | None = None,
        min: int | None = None,
        max: int | None = None,
        unit: str = "tokens",
    ):
        if (target is None) == (min is None and max is None):
            raise ValueError("length takes a TARGET, or a MIN, a MAX or both")
        if unit not in ("tokens", "words"):
            raise ValueError(f"unit is tokens or words, not {unit!r}")
        self.low = target if target is not None else min or 0
        self.high = target if target is not None else float("inf") if max is None else max
        if self.high < 1:
            raise ValueError("the longest wanted length is below 1")
        if self.low > self.high:
            raise ValueError(f"MIN {self.low} is above MAX {self.high}")
        self.unit = unit

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: list[list[int]] | None = None,
        **columns,
    ) -> list[float]:
        if self.unit == "words":
            lengths = [len(text.split()) for text in texts_of(completions)]
        elif completion_ids is not None:
            lengths = [len(ids) for ids in completion_ids]
        else:
            raise ValueError("length in tokens needs completion_ids")
        return [self._score(length) for length in lengths]

    def _score(self, length: int) -> float:
        if length < self.low:
            return length / self.low
        if length > self.high:
            return max(0.0, 2.0 - length / self.high)
        return 1.0
