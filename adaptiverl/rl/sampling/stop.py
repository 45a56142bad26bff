"""Strings that end a completion, found in tokens by the library's matching, on the device.

A string may span tokens, and begin and end inside them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, StopStringCriteria

NO_TOKEN = 2**31 - 1  # an id that no vocabulary has, so it matches nothing


class StopStrings:
    """Finds `strings` at the end of completions; each token is looked at in a window of `width`.

    What is given must be on `device`: graphs of CUDA read the tables where they are. Raises
    ValueError if no token can end any of the strings.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        strings: Sequence[str],
        device: torch.device | str = "cpu",
    ):
        self.strings = list(strings)
        self._criteria = StopStringCriteria(tokenizer, self.strings)
        self._criteria.embedding_vec = self._criteria.embedding_vec.to(device)
        self._criteria.target_lens = self._criteria.target_lens.to(device)
        self.width = self._criteria.maximum_token_len  # a token has one byte or more

    def __call__(self, recent: Tensor) -> Tensor:
        """[n], whether the last token of each row of `recent` [n, ≤ width] completes a string."""
        return self._criteria(recent, None)

    def ends(self, tokens: Tensor) -> Tensor:
        """[B, T], whether each of `tokens` [B, T] completes a string that begins in its row."""
        windows = pad(tokens, (self.width - 1, 0), value=NO_TOKEN).unfold(1, self.width, 1)
        return self(windows.flatten(0, 1)).view(tokens.shape)

    def cut(self, text: str) -> str:
        """`text`, which a string has ended, up to where the first of them begins."""
        places = [place for each in self.strings if (place := text.find(each)) >= 0]
        if places:
            return text[: min(places)]
        # SentencePiece leaves out the space before the first word, which the tokens have.
        return "" if any(text.startswith(each.lstrip(" ")) for each in self.strings) else text
