"""Attention over token trees: packing, shared prompt prefixes and catalogue tries are one idea.

Tokens stand in depth-first order, and every token knows the exclusive `end` of its subtree. Query q may see
key k iff `k <= q < end[k]`; in a sliding-window layer their positions also differ by less than the window.

    packing:         every token of a sample ends where the sample ends
    shared prefix:   its tokens end with the row, so every sample sees them; they are computed once
    catalogue trie:  `TokenTrie.end` as it is
    padding:         end[i] = i + 1, the token sees only itself

There are two executions of the same rule. `tree_mask` is a dense boolean mask, for evaluation and as the
reference. `tree_attention` is an attention function that is registered with transformers as "gdrt_tree" and
never builds the dense mask: on CPUs it is one scaled_dot_product_attention per sample, on CUDA one
FlexAttention call (flex_rows.py).

Shapes: T tokens of a packed row, A query heads, K key heads, D head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gdrt_ds.batches.flex_rows import flex_rows
from gdrt_ds.runtime.devices import to_device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ATTENTION_NAME = "gdrt_tree"


def tree_mask(
    end: Tensor, *, past: int = 0, positions: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Returns the dense visibility of a token tree.

    Args:
        end: Long[T], exclusive end of each token's subtree.
        past: cached tokens in front, visible to all (their window is the caller's to apply).
        positions: Long[T], needed with `window`.
        window: sliding-window size in positions; None = unlimited.

    Returns:
        Bool[T, past + T], True where the query (row) may see the key (column).
    """
    index = torch.arange(end.numel(), device=end.device)
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
    if window is not None:
        if positions is None:
            raise ValueError("tree_mask: a window needs positions")
        visible &= positions[:, None] - positions[None, :] < window
    if past:
        visible = torch.cat([visible.new_ones(end.numel(), past), visible], dim=1)
    return visible


@dataclass(frozen=True)
class TreeLayout:
    """One packed row: an optional shared prompt prefix, then samples one after the other.

    Attributes:
        lengths: tokens of each sample, the shared prefix not counted.
        head: tokens of the shared prefix (0 = none).
        end, positions: Long[T] of the rule above and of the rotary or learned embedding.
        block_masks: what FlexAttention made of the layout, by window (flex_rows.py); every layer of the
            forward and of its recomputation uses them.
        varlen: the cumulative lengths of the samples on the device and the longest (varlen_rows.py), where
            flash-attn has asked for them.
    """

    lengths: tuple[int, ...]
    head: int
    end: Tensor
    positions: Tensor
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict, compare=False, repr=False)
    varlen: tuple[Tensor, int] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def build(cls, lengths: list[int], head: int = 0, device: torch.device | str = "cpu") -> TreeLayout:
        end, positions = _host_rule(tuple(lengths), head)
        return cls(tuple(lengths), head, to_device(end, device), to_device(positions, device))

    def host_rule(self) -> tuple[Tensor, Tensor]:
        """Returns end and positions on the CPU. Reading them from the device would wait for it."""
        return _host_rule(self.lengths, self.head)


def _host_rule(lengths: tuple[int, ...], head: int) -> tuple[Tensor, Tensor]:
    """(end, positions), Long[T] on the CPU."""
    total = head + sum(lengths)
    end = torch.full((total,), total, dtype=torch.long)
    positions = torch.arange(total, dtype=torch.long)
    start = head
    for length in lengths:
        end[start : start + length] = start + length
        positions[start : start + length] = torch.arange(head, head + length)
        start += length
    return end, positions


@functools.lru_cache(maxsize=256)
def _sample_mask(length: int, head: int, window: int | None) -> Tensor:
    """Returns Bool[length, head + length]: one sample's queries against the shared prefix and itself."""
    query = torch.arange(head, head + length)[:, None]
    key = torch.arange(head + length)[None, :]
    mask = key <= query
    if window is not None:
        mask = mask & (query - key < window)
    return mask


def _segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scale: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Attends sample by sample, [1, A, T, D] -> [1, A, T, D]; work is linear in the number of samples.

    Rows are cut by `split`, whose backward is one concatenation: a slice per sample would fill and
    add a whole row's gradient each.
    """
    options = dict(dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    head = layout.head
    sizes = list(layout.lengths)
    if head:
        sizes = [head, *sizes]
    queries, keys, values = (list(part.split(sizes, dim=2)) for part in (query, key, value))
    outputs = []
    if head:
        mask = None
        if window is not None:
            mask = to_device(_sample_mask(head, 0, window), query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                queries.pop(0), keys[0], values[0], attn_mask=mask, is_causal=mask is None, **options
            )
        )
        keys = [torch.cat([keys[0], own], dim=2) for own in keys[1:]]
        values = [torch.cat([values[0], own], dim=2) for own in values[1:]]
    for length, own_query, own_keys, own_values in zip(layout.lengths, queries, keys, values, strict=True):
        mask = None
        if head or window is not None:
            mask = to_device(_sample_mask(length, head, window), query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                own_query, own_keys, own_values, attn_mask=mask, is_causal=mask is None, **options
            )
        )
    return torch.cat(outputs, dim=2)


def tree_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    tree_layout: TreeLayout | None = None,
    softcap: float | None = None,
    *,
    per_sample: bool = False,
    **kwargs,
):
    """The attention function that transformers calls.

    Without a layout (evaluation, padded batches) it is SDPA.

    Args:
        query: [B, A, T, D].
        key, value: [B, K, T, D].
        per_sample: one SDPA call per sample on every device. It is also used under attention dropout, which
            FlexAttention does not have.

    Returns:
        [B, T, A, D], and no attention weights.
    """
    if tree_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if softcap is not None:
        raise ValueError(
            "packed rows are not supported for models with attention soft-capping; set train.packing=none"
        )
    if query.is_cuda and dropout == 0.0 and not per_sample:
        output = flex_rows(query, key, value, tree_layout, scaling, sliding_window)
    else:
        output = _segments(query, key, value, tree_layout, scaling, dropout, sliding_window)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, tree_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def packed_inputs(layout: TreeLayout, device: torch.device | str) -> dict:
    """Returns the keyword arguments that carry a layout through a transformers model.

    A four-dimensional mask is passed through untouched by transformers, so that no dense mask is built; the
    attention function ignores it and follows the layout.
    """
    return {
        "position_ids": layout.positions[None].to(device),
        "tree_layout": layout,
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
    }
