"""The tree attention as one SDPA call per sample on every device: the way round FlexAttention.

On a GPU packed rows usually go through one compiled FlexAttention call. This compiles nothing, so it also
runs where the compiler does not, and where rows have too many lengths for it; it is slower with many short
samples in a row.
"""

from __future__ import annotations

import functools

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from gdrt_ds.batches.tree_attention import tree_attention
from gdrt_ds.models.attention.base import PACKINGS, AttentionBackend, needs_sdpa

NAME = "tree_sdpa"
AttentionInterface.register(NAME, functools.partial(tree_attention, per_sample=True))
AttentionMaskInterface.register(NAME, sdpa_mask)

BACKEND = AttentionBackend(NAME, obstacle=needs_sdpa, packings=PACKINGS, packed_by=NAME, dense_masks=True)
