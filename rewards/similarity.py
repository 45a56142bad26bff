"""Reward by meaning: cosine similarity of sentence embeddings to a reference text."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from rewards.base import Column, Place, Reward
from rewards.messages import Texts, texts_of


class CosineReward(Reward):
    """Cosine similarity, −1 to 1, of sentence embeddings of the completion and a reference.

    A row whose reference is absent or empty is not applicable: None.
    """

    loads_model: ClassVar[bool] = True
    type: Literal["cosine"] = "cosine"
    model: Place = Field("all-MiniLM-L6-v2", description="A sentence-transformers id or folder")
    column: str = Field("reference", description="Column that holds the reference text")
    _encoder: Any

    def _load(self, device: Any) -> None:
        from sentence_transformers import SentenceTransformer  # seconds to import

        self._encoder = SentenceTransformer(self.model, device=device and str(device))

    def check_columns(self, columns: Mapping[str, Iterable], source: str) -> None:
        if self.column == "prompt":
            raise ValueError(
                "COLUMN prompt: prompts are no references, and no reward gets that column. Name "
                "the column that holds the references"
            )
        if self.column not in columns:
            raise ValueError(f"{source} has no column {self.column!r} (COLUMN)")
        for row, value in enumerate(columns[self.column]):
            if value and not isinstance(value, str | list):
                raise ValueError(
                    f"column {self.column!r} of {source} (COLUMN) has {value!r:.60} in row {row} "
                    "(counted from 0): a reference is a text"
                )

    def __call__(self, prompts: Texts, completions: Texts, **columns: Any) -> Column:
        self.start()
        if self.column not in columns:
            raise ValueError(f"the prompts have no column {self.column!r} to compare with")
        references = columns[self.column]
        rows = [i for i, text in enumerate(references) if text]
        result: Column = [None] * len(completions)
        if rows:
            texts = texts_of([completions[i] for i in rows] + [references[i] for i in rows])
            embedded = self._encoder.encode(
                texts, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
            )
            ours, theirs = embedded.split(len(rows))
            for i, cosine in zip(rows, (ours * theirs).sum(-1).tolist(), strict=True):
                result[i] = cosine
        return result
