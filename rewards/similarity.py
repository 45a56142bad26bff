"""Reward by meaning: cosine similarity of sentence embeddings to a reference text."""

from collections.abc import Sequence

from rewards.messages import Text, texts_of


class CosineReward:
    """Cosine, in [-1, 1], between the embeddings of a completion and of column `column`.

    `model` is a sentence-transformers hub id or folder. A row whose reference is absent or empty is
    not applicable: None.
    """

    def __init__(self, model: str, column: str = "reference", device: str | None = None):
        from sentence_transformers import SentenceTransformer  # seconds to import

        self.model = SentenceTransformer(str(model), device=device)
        self.column = column

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence
    ) -> list[float | None]:
        if self.column not in columns:
            raise ValueError(f"the prompts have no column {self.column!r} to compare with")
        references = columns[self.column]
        rows = [i for i, text in enumerate(references) if text]
        result: list[float | None] = [None] * len(completions)
        if rows:
            texts = texts_of([completions[i] for i in rows] + [references[i] for i in rows])
            embedded = self.model.encode(
                texts, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
            )
            ours, theirs = embedded.split(len(rows))
            for i, cosine in zip(rows, (ours * theirs).sum(-1).tolist(), strict=True):
                result[i] = cosine
        return result
