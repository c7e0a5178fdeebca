"""Last-item Markov: P(i | last item j) = (n_ji + P(i)) / (n_j + 1).

n_ji are the train windows whose history ends in j and whose target is i, n_j those whose history ends in j,
and P(i) is popularity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from eval.floors.base import Floor
from eval.floors.popularity import popularity
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import Corpus


class Markov:
    """What followed the last item in train, smoothed by popularity."""

    def __init__(self, corpus: Corpus, catalogue: Catalogue):
        self.notes: list[str] = []
        self.index_of = catalogue.index_of
        self.popularity = popularity(catalogue)
        self.next: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for sample in corpus.splits["train"]:
            if sample.history and sample.target in self.index_of and sample.history[-1] in self.index_of:
                self.next[self.index_of[sample.history[-1]]][self.index_of[sample.target]] += 1

    def log_probs(self, histories: Sequence[tuple[str, ...]]) -> np.ndarray:
        return np.log(np.stack([self._probabilities(history) for history in histories]))

    def _probabilities(self, history: tuple[str, ...]) -> np.ndarray:
        """Of one user, float64 [I]."""
        if not history:
            return self.popularity
        after = self.next.get(self.index_of[history[-1]], {})
        probability = self.popularity.copy()
        for entry, count in after.items():
            probability[entry] += count
        return probability / (sum(after.values()) + 1)


def fit(corpus: Corpus, catalogue: Catalogue, asked: bool) -> Markov:
    return Markov(corpus, catalogue)


FLOOR = Floor(fit, order=20)
