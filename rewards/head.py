"""A reward model that learns from labels while they are given, and says how far to trust it.

Ridge regression on the words and pairs of words of a completion; λ by leave-one-out. Fitted anew to
the labels each time, so it has no state to save. It does not read the prompt: there are too few
labels for that.
"""

from collections.abc import Sequence

import numpy as np

MIN_LABELS = 20  # that it takes to be fitted
MAX_LABELS = 1000  # that it learns from
MAX_WORDS = 4096  # words and pairs of words that it knows, the most frequent ones
LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class RidgeHead:
    """Fitted to `texts` [n] and their `labels` [n], −1 to 1; raises ValueError for too few.

    `left_out` [n] is what the head predicts for each label from the others. `error` is the root
    mean square of its errors, `error_of_mean` that of the mean of the other labels, and `slope` how
    much labels rise where the prediction rises by 1: below 1 it exaggerates.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[float]):
        if len(texts) < MIN_LABELS:
            raise ValueError(f"{len(texts)} labels are fewer than {MIN_LABELS}")
        from sklearn.feature_extraction.text import TfidfVectorizer  # a second to import
        from sklearn.linear_model import RidgeCV

        y = np.array(labels, dtype=np.float64)
        self.vectorizer = TfidfVectorizer(
            token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), max_features=MAX_WORDS, use_idf=False
        ).fit(texts)
        # Given a scorer, RidgeCV stores the predictions from which it computes the scores.
        self.ridge = RidgeCV(LAMBDAS, scoring="neg_mean_squared_error", store_cv_results=True)
        self.ridge.fit(self.features(texts), y)
        chosen = LAMBDAS.index(self.ridge.alpha_)
        self.left_out: np.ndarray = self.ridge.cv_results_[:, chosen]
        self.error = float(np.sqrt(((y - self.left_out) ** 2).mean()))
        self.error_of_mean = float(y.std() * len(y) / (len(y) - 1))
        spread = self.left_out - self.left_out.mean()
        variance = (spread**2).sum()
        varies = variance > 1e-9 * len(y)  # or it always predicts the same
        self.slope = float((spread * (y - y.mean())).sum() / variance) if varies else 0.0

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """The predicted labels of `texts`, −1 to 1."""
        return self.ridge.predict(self.features(texts)).clip(-1, 1).tolist()

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """[n, words]: counts of words and pairs of words, rows of length 1.

        Dense, because RidgeCV takes forty times as long to centre a sparse matrix.
        """
        return self.vectorizer.transform(texts).toarray()
