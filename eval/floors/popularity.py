"""Most popular: P(i) = (n_i + 1) / (n + I), n_i the train interactions of entry i, I entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.floors.base import Floor
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import Corpus


def popularity(catalogue: Catalogue) -> np.ndarray:
    """Share of the train interactions of each entry, one added to every count; float64 [I]."""
    counts = np.array([entry.train_count for entry in catalogue.entries], dtype=np.float64)
    return (counts + 1) / (counts.sum() + len(counts))


class Popularity:
    """The same list for everyone."""

    def __init__(self, catalogue: Catalogue):
        self.notes: list[str] = []
        self.scores = np.log(popularity(catalogue))

    def log_probs(self, histories: Sequence[tuple[str, ...]]) -> np.ndarray:
        return np.broadcast_to(self.scores, (len(histories), len(self.scores)))


def fit(corpus: Corpus, catalogue: Catalogue, asked: bool) -> Popularity:
    return Popularity(catalogue)


FLOOR = Floor(fit, order=10)
