"""Batches of samples -> predictions, in one of the modes."""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.loading import Subject
from eval.metrics.calibration import nll_curve
from eval.predictions.options import ScoringOptions
from eval.predictions.rows import describe, item_order
from eval.scoring import (
    BestFirst,
    SearchResult,
    beam_search,
    expected_rank,
    num_tied,
    path_scores,
    top_entries,
)
from gdrt_ds.data.corpus import Sample
from gdrt_ds.inference.catalogue_scoring import CatalogueScorer


class SampleScorer:
    """Scores batches of samples.

    Args:
        keep: ids of samples whose scores stay in `kept` (exact modes).

    Attributes:
        kept: history -> float64 [items], log-probabilities of the catalogue.
    """

    def __init__(self, subject: Subject, options: ScoringOptions, keep: frozenset[int] = frozenset()):
        self.subject = subject
        self.options = options
        self.keep = keep
        self.kept: dict[tuple[str, ...], np.ndarray] = {}
        self.reader = subject.recommender.reader
        self.trie = subject.recommender.trie
        self.order = item_order(subject)
        self.exact = None
        self.search = None
        if options.exact:
            self.exact = CatalogueScorer(self.reader, self.trie, options.scoring, options.max_score_bytes)
        elif options.mode == "best_first":
            self.search = BestFirst(self.reader, self.trie, options.scoring, options.max_nodes)

    def score(self, samples: list[Sample]) -> list[dict[str, Any]]:
        """One object of predictions.jsonl per sample."""
        prompts = [self.subject.recommender.prompt_of(sample.history) for sample in samples]
        targets = [self.subject.catalogue.index_of[sample.target] for sample in samples]
        if self.exact is not None:
            rows = self.exact.score(prompts).numpy()
            return [self._of_scores(*one) for one in zip(samples, targets, rows, strict=True)]
        # Searches read the prompts once, then go down the trie as far as its longest title.
        self.reader.check_length(max(map(len, prompts)) + int(self.trie.depth.max()) - 1)
        state = self.reader.read(prompts)
        nll = -path_scores(self.reader, self.trie, state, targets, self.options.scoring)
        if self.search is not None:
            found = self.search.search(state, self.options.k)
            return [self._of_search(*one) for one in zip(samples, targets, found, nll, strict=True)]
        lists = beam_search(
            self.reader,
            self.trie,
            state,
            self.options.beams,
            self.options.scoring,
            self.options.length_penalty,
        )
        return [self._of_beams(*one) for one in zip(samples, targets, lists, nll, strict=True)]

    def _of_scores(self, sample: Sample, target: int, scores: np.ndarray) -> dict[str, Any]:
        """From exact scores of the whole catalogue, float64 [items]."""
        if sample.sample_id in self.keep:
            self.kept[tuple(sample.history)] = scores.copy()
        top = top_entries(scores, self.options.k, self.order)
        return describe(
            self.subject,
            sample,
            rank=expected_rank(scores, target),
            tied=num_tied(scores, target),
            top=top,
            top_scores=scores[top],
            nll=-scores[target],
            curve=nll_curve(scores, target),
            num_nan=int(np.isnan(scores).sum()),
        )

    def _of_search(self, sample: Sample, target: int, found: SearchResult, nll: float) -> dict[str, Any]:
        """From a best-first search, whose list is proven as far as `certified`."""
        row = self._of_list(sample, target, found.entries, found.scores, nll, found.certified)
        return {**row, "certified": found.certified, "nodes_expanded": found.expanded}

    def _of_beams(
        self, sample: Sample, target: int, found: tuple[np.ndarray, np.ndarray], nll: float
    ) -> dict[str, Any]:
        """From a beam search, whose list is taken as it is."""
        entries, scores = found
        return self._of_list(sample, target, entries, scores, nll, len(entries))

    def _of_list(
        self, sample: Sample, target: int, entries: np.ndarray, scores: np.ndarray, nll: float, known: int
    ) -> dict[str, Any]:
        """A target among the first `known` places has a rank; elsewhere its rank is not known."""
        place = np.flatnonzero(entries[:known] == target)
        return describe(
            self.subject,
            sample,
            rank=float(place[0] + 1) if len(place) else None,
            tied=1,
            top=entries[: self.options.k],
            top_scores=scores[: self.options.k],
            nll=nll,
        )
