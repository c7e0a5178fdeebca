"""Two floors that every model is shown beside: most-popular, and last-item Markov. Fitted on train, no
parameter is tuned.

Both give probabilities over the whole catalogue, so every metric, target NLL included, is computed for them
as for a model. popularity  P(i) = (n_i + 1) / (n + I)
markov      P(i | last item j) = (n_ji + P(i)) / (n_j + 1), n_ji = train windows whose history ends in j and
whose target is i I entries; n_i train interactions of entry i.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from eval.loading import Subject
from eval.metrics.calibration import nll_curve
from eval.predictions import describe
from eval.scoring.ranking import expected_rank, num_tied, top_entries

FLOORS = ("popularity", "markov")


class Floors:
    """Log-probabilities of both floors for any history."""

    def __init__(self, subject: Subject):
        catalogue = subject.catalogue
        self.index_of = catalogue.index_of
        counts = np.array([entry.train_count for entry in catalogue.entries], dtype=np.float64)
        self.popularity = (counts + 1) / (counts.sum() + len(counts))
        self.next: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for sample in subject.corpus.splits["train"]:
            if sample.history and sample.target in self.index_of and sample.history[-1] in self.index_of:
                self.next[self.index_of[sample.history[-1]]][self.index_of[sample.target]] += 1

    def log_probs(self, floor: str, history: tuple[str, ...]) -> np.ndarray:
        """float64 [items], sums to one after exp."""
        probability = self.popularity
        if floor == "markov" and history:
            after = self.next.get(self.index_of[history[-1]], {})
            probability = probability.copy()
            for entry, count in after.items():
                probability[entry] += count
            probability /= sum(after.values()) + 1
        return np.log(probability)


def floor_predictions(subject: Subject, floor: str, order: np.ndarray, k: int) -> list[dict[str, Any]]:
    """Predictions of a floor, in the form of predictions.jsonl."""
    floors, result = Floors(subject), []
    for sample in subject.samples:
        scores = floors.log_probs(floor, sample.history)
        target = subject.catalogue.index_of[sample.target]
        top = top_entries(scores, k, order)
        result.append(
            describe(
                subject,
                sample,
                rank=expected_rank(scores, target),
                tied=num_tied(scores, target),
                top=top,
                top_scores=scores[top],
                nll=-scores[target],
                curve=nll_curve(scores, target),
            )
        )
    return result
