"""What a micro-batch costs in tokens, by how it is laid out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gdrt_ds.batches.prefix_tree import in_order, shared_lengths


def tokens_of(rows: Sequence[np.ndarray], head: int, packing: str) -> int:
    """Tokens that one micro-batch of these rows computes."""
    lengths = [len(row) for row in rows]
    if packing == "none":
        return max(lengths) * len(rows)
    if packing == "shared_prefix":
        return sum(lengths) - head * (len(rows) - 1)
    if packing == "prefix_tree":
        return sum(lengths) - int(shared_lengths([rows[index] for index in in_order(rows)]).sum())
    return sum(lengths)
