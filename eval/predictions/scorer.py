"""Batches of samples -> predictions, in one of the modes; and a check that the model is scored correctly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

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
    per_item_scores,
    top_entries,
)
from gdrt_ds.data.corpus import Sample
from gdrt_ds.errors import UserError
from gdrt_ds.inference.catalogue_scoring import CatalogueScorer

# Largest difference to per-item scoring at the start of a scoring job, in nats. fp32 rounding of a title
# stays below 1e-3 on every family tried; a wrong mask or position gives tenths and more. Half precision
# rounds logits to 1/64 and less.
CHECK_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 1.0, torch.float16: 0.3}


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


def check_exactness(subject: Subject, options: ScoringOptions) -> str:
    """Compares tree scores with plain per-item scoring on the first sample: its target and two other items.

    Returns:
        a line that says how far they are apart.
    Raises:
        UserError: they differ. This architecture does something with masks or positions that scoring does not
            know.
    """
    recommender = subject.recommender
    sample = subject.samples[0]
    entries = sorted({subject.catalogue.index_of[sample.target], 0, len(subject.catalogue) // 2})
    prompt = recommender.prompt_of(sample.history)
    found = per_item_scores(recommender.loaded.model, recommender.trie, prompt, entries, options.scoring)
    by_tree = _tree_scores(subject, options, prompt, entries)
    if not bool(torch.isfinite(found).all()):
        return "check: the model gives NaN or infinite scores; they count as the worst rank"
    difference = float((by_tree.double() - found).abs().max())
    dtype = recommender.reader.mask_dtype
    # A NaN difference is no agreement either, hence `not <=`.
    if not difference <= CHECK_TOLERANCE.get(dtype, 1.0):
        raise UserError(
            f"scores of {type(recommender.loaded.model).__name__} in {dtype} differ by {difference:.3g} nats "
            "from scoring items one by one",
            "this model family is not supported by tree scoring (or the dtype is too coarse: set "
            "model.dtype=float32)",
        )
    return (
        f"check: tree scores equal scoring items one by one within {difference:.1e} nats "
        f"({len(entries)} items, {str(dtype).removeprefix('torch.')})"
    )


def _tree_scores(
    subject: Subject, options: ScoringOptions, prompt: list[int], entries: Sequence[int]
) -> torch.Tensor:
    """Scores of the entries as the chosen mode computes them, [len(entries)]."""
    reader = subject.recommender.reader
    trie = subject.recommender.trie
    state = reader.read([prompt])
    if options.exact:
        scorer = CatalogueScorer(reader, trie, options.scoring, options.max_score_bytes)
        return scorer.score_state(state)[0, entries]
    return torch.tensor(
        [float(path_scores(reader, trie, state, [entry], options.scoring)[0]) for entry in entries]
    )
