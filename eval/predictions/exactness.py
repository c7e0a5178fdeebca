"""Whether the scores of this model may be called exact: tree scores beside scoring items one by one.

Rounding in the model's dtype separates the two. In float32, in which models are scored unless the user names
another dtype or it does not fit, they agree within 1e-3 nats on every family tried. In bfloat16 and float16,
whose logits are rounded to 1/64 and less, they do not, and then the scores are not called exact. A wrong mask
or position gives tenths of a nat and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from eval.loading import Subject
from eval.predictions.options import ScoringOptions
from eval.scoring import path_scores, per_item_scores
from gdrt_ds.errors import UserError
from gdrt_ds.inference.catalogue_scoring import CatalogueScorer

EXACT_WITHIN = 1e-3
"""Nats. Scores are called exact up to this difference."""

REFUSED_ABOVE = {torch.float32: 0.05, torch.bfloat16: 1.0, torch.float16: 0.3}
"""Nats. More than rounding in this dtype: the model family is not scored correctly."""


@dataclass(frozen=True)
class Exactness:
    """What the check found on the first sample.

    Attributes:
        difference_nats: the largest difference of the two ways; None where the model's scores are not finite.
        num_items: items that were compared.
        dtype: in which the model computed.
    """

    difference_nats: float | None
    num_items: int
    dtype: str

    @property
    def exact(self) -> bool:
        return self.difference_nats is not None and self.difference_nats <= EXACT_WITHIN

    def line(self) -> str:
        """What a person is told before the scoring."""
        if self.difference_nats is None:
            return "check: the model gives NaN or infinite scores; they count as the worst rank"
        seen = f"{self.difference_nats:.1e} nats ({self.num_items} items, {self.dtype})"
        if self.exact:
            return f"check: tree scores equal scoring items one by one within {seen}"
        return f"warning: {self._not_exact(seen)}"

    def notes(self) -> list[str]:
        """What a reader of the results has to know."""
        if self.difference_nats is None or self.exact:
            return []
        return [self._not_exact(f"{self.difference_nats:.1e} nats ({self.num_items} items, {self.dtype})")]

    def _not_exact(self, seen: str) -> str:
        return (
            f"scores are not exact: tree scores and scoring items one by one differ by {seen}, more than "
            f"{EXACT_WITHIN:g}; they are computed in {self.dtype}, float32 gives exact ones"
        )

    def figures(self) -> dict[str, Any]:
        """For results.json."""
        return {**asdict(self), "exact": self.exact, "exact_within_nats": EXACT_WITHIN}


def check_exactness(subject: Subject, options: ScoringOptions) -> Exactness:
    """Compares tree scores with plain per-item scoring on the first sample: its target and two other items.

    Raises:
        UserError: they differ by more than rounding. This architecture does something with masks or positions
            that scoring does not know.
    """
    recommender = subject.recommender
    sample = subject.samples[0]
    entries = sorted({subject.catalogue.index_of[sample.target], 0, len(subject.catalogue) // 2})
    prompt = recommender.prompt_of(sample.history)
    found = per_item_scores(recommender.loaded.model, recommender.trie, prompt, entries, options.scoring)
    by_tree = _tree_scores(subject, options, prompt, entries)
    dtype = recommender.reader.mask_dtype
    word = str(dtype).removeprefix("torch.")
    if not bool(torch.isfinite(found).all()):
        return Exactness(None, len(entries), word)
    difference = float((by_tree.double() - found).abs().max())
    # A NaN difference is no agreement either, hence `not <=`.
    if not difference <= REFUSED_ABOVE.get(dtype, 1.0):
        raise UserError(
            f"scores of {type(recommender.loaded.model).__name__} in {dtype} differ by {difference:.3g} nats "
            f"from scoring items one by one; at most {REFUSED_ABOVE.get(dtype, 1.0):g} can be rounding",
            "this model family is not supported by tree scoring (or the dtype is too coarse: set "
            "model.dtype=float32)",
        )
    return Exactness(difference, len(entries), word)


def _tree_scores(
    subject: Subject, options: ScoringOptions, prompt: list[int], entries: Sequence[int]
) -> torch.Tensor:
    """Scores of the entries as the chosen mode computes them, [len(entries)]."""
    reader = subject.recommender.reader
    trie = subject.recommender.trie
    state = reader.read([prompt])
    if options.exact:
        scorer = CatalogueScorer(reader, trie, options.scoring, options.max_score_bytes)
        return scorer.score_state(state, list(entries))[0]
    return torch.tensor(
        [float(path_scores(reader, trie, state, [entry], options.scoring)[0]) for entry in entries]
    )
