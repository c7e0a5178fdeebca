"""Scores the samples of a subject and writes predictions.jsonl: in batches, over ranks, resumable, with
progress.

options.py   how to score
scorer.py    batches of samples -> predictions
exactness.py the check against scoring items one by one
rows.py      one object of predictions.jsonl
predict.py   scores what is missing, rank by rank
parts.py     finished samples on disk, and how they are joined
progress.py  what a person sees meanwhile
"""

from eval.predictions.exactness import Exactness, check_exactness
from eval.predictions.options import MODES, SCORINGS, ScoringOptions
from eval.predictions.parts import claim_output
from eval.predictions.predict import predict, scoring_key
from eval.predictions.progress import Progress
from eval.predictions.rows import describe, item_order
from eval.predictions.scorer import SampleScorer

__all__ = [
    "MODES",
    "SCORINGS",
    "Progress",
    "SampleScorer",
    "ScoringOptions",
    "Exactness",
    "check_exactness",
    "claim_output",
    "describe",
    "item_order",
    "predict",
    "scoring_key",
]
