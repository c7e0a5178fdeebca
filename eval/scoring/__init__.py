"""Scoring beside the exact tree pass, which is in `gdrt_ds.inference.catalogue_scoring` for recommending too.

per_item    the reference: one plain forward pass per item
best_first  certified exact top-K of large catalogues
beam        constrained beam search, for parity with peers
ranking     expected ranks, ties, NaN, top lists
"""

from eval.scoring.beam import beam_search
from eval.scoring.best_first import BestFirst, SearchResult
from eval.scoring.node_cache import path_scores
from eval.scoring.per_item import per_item_scores
from eval.scoring.ranking import expected_rank, num_tied, top_entries

__all__ = [
    "BestFirst",
    "SearchResult",
    "beam_search",
    "expected_rank",
    "num_tied",
    "path_scores",
    "per_item_scores",
    "top_entries",
]
