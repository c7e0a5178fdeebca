"""How to score: the options of `python -m eval.run` that decide what predictions say."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eval.modes import EXACT, MODES, scoring_of
from eval.numbers import refuse_below
from gdrt_ds.errors import UserError
from gdrt_ds.inference.catalogue_scoring import SCORINGS


@dataclass(frozen=True)
class ScoringOptions:
    """How to score.

    Attributes:
        mode: `renormalised` or `full` scores the whole catalogue exactly, with probabilities over the
            catalogue's tokens or over the whole vocabulary; `best_first` finds a certified exact top-k;
            `beam` is constrained beam search.
        scoring: `renormalised` or `full` for best_first and beam. In the exact modes it is the mode. Empty
            until the object is made: the mode, or `renormalised` for a search.
        k: length of the lists.
        batch_size: samples scored at once.
        max_score_bytes: bound on working memory beside weights and prompts, in bytes.
        beams: width of beam mode.
        length_penalty: of beam mode; transformers' default is 1.
        max_nodes: best_first gives up certification after this many nodes per sample; None = never.

    Raises:
        UserError: an unknown mode or scoring, a scoring that contradicts an exact mode, a number below 1, or
            a length penalty that is not finite.
    """

    mode: str = "renormalised"
    scoring: str = ""
    k: int = 50
    batch_size: int = 8
    max_score_bytes: int = 2 << 30
    beams: int = 10
    length_penalty: float = 0.0
    max_nodes: int | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"--mode {self.mode} is unknown", f"choose one of {', '.join(MODES)}")
        if self.scoring and self.scoring not in SCORINGS:
            raise UserError(f"--scoring {self.scoring} is unknown", f"choose one of {', '.join(SCORINGS)}")
        for name in ("k", "batch_size", "beams", "max_score_bytes", "max_nodes"):
            refuse_below(1, f"--{name.replace('_', '-')}", getattr(self, name))
        if not math.isfinite(self.length_penalty):
            raise UserError(
                f"--length-penalty {self.length_penalty} is no finite number",
                "give 0 (no penalty), 1 (transformers' default) or another number",
            )
        object.__setattr__(self, "scoring", scoring_of(self.mode, self.scoring))

    @property
    def exact(self) -> bool:
        """Whether every item of the catalogue gets its exact score."""
        return self.mode in EXACT
