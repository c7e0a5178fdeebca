"""Attention over token trees: packing, shared prompt prefixes and catalogue tries are one idea.

Tokens stand in depth-first order, and every token knows the exclusive `end` of its subtree. Query q may see
key k iff `k <= q < end[k]`; in a sliding-window layer their positions also differ by less than the window.

    packing:         every token of a sample ends where the sample ends
    shared prefix:   its tokens end with the row, so every sample sees them; they are computed once
    prefix tree:     a token ends where the last sample that begins with it ends
    catalogue trie:  `TokenTrie.end` as it is
    padding:         end[i] = i + 1, the token sees only itself

There are two executions of the same rule. `tree_mask` is a dense boolean mask, for evaluation and as the
reference. `tree_attention` is an attention function that is registered with transformers as "gdrt_tree" and
never builds the dense mask: on CPUs it is one scaled_dot_product_attention per chain, on CUDA one
FlexAttention call (flex_rows.py).

Shapes: T tokens of a packed row, A query heads, K key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gdrt_ds.batches.flex_rows import flex_rows
from gdrt_ds.batches.prefix_tree import Chain, PrefixTree
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
    """One packed row as a tree of chains (prefix_tree.py): a shared head with samples behind it, or any tree.

    Attributes:
        chains: runs of tokens in the order of the row; a chain's parent comes before it.
        end, positions: Long[T] of the rule above and of the rotary or learned embedding.
        host: both on the CPU.
        block_masks: what FlexAttention made of the layout, by window (flex_rows.py); every layer of the
            forward and of its recomputation uses them.
        chain_masks: what each chain sees in SDPA, by length, depth and window; likewise.
        varlen: the cumulative lengths of the samples on the device and the longest (varlen_rows.py), where
            flash-attn has asked for them.
    """

    chains: tuple[Chain, ...]
    end: Tensor
    positions: Tensor
    host: tuple[Tensor, Tensor] = field(compare=False, repr=False)
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict, compare=False, repr=False)
    chain_masks: dict[tuple[int, int, int | None], Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )
    varlen: tuple[Tensor, int] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def build(cls, lengths: list[int], head: int = 0, device: torch.device | str = "cpu") -> TreeLayout:
        """Returns the layout of an optional shared head, then samples one after the other.

        Args:
            lengths: tokens of each sample, the head not counted.
            head: tokens of the shared head; 0 = none.
        """
        total = head + sum(lengths)
        end = torch.full((total,), total, dtype=torch.long)
        positions = torch.arange(total, dtype=torch.long)
        chains = [Chain(head)] if head else []
        start = head
        for length in lengths:
            end[start : start + length] = start + length
            positions[start : start + length] = torch.arange(head, head + length)
            chains.append(Chain(length, parent=0, depth=head) if head else Chain(length))
            start += length
        return cls._on(device, chains, end, positions)

    @classmethod
    def of_tree(cls, tree: PrefixTree, device: torch.device | str = "cpu") -> TreeLayout:
        """Returns the layout of rows whose common prefixes are merged."""
        return cls._on(device, tree.chains, torch.from_numpy(tree.end), torch.from_numpy(tree.positions))

    @classmethod
    def _on(
        cls, device: torch.device | str, chains: list[Chain], end: Tensor, positions: Tensor
    ) -> TreeLayout:
        host = (end, positions)
        return cls(tuple(chains), to_device(end, device), to_device(positions, device), host)

    def host_rule(self) -> tuple[Tensor, Tensor]:
        """Returns end and positions on the CPU. Reading them from the device would wait for it."""
        return self.host

    def chain_mask(self, chain: Chain, window: int | None) -> Tensor:
        """`_chain_mask` on the device, made once: it grows with the square of a sample's length."""
        key = (chain.length, chain.depth, window)
        if key not in self.chain_masks:
            self.chain_masks[key] = to_device(_chain_mask(*key), self.end.device)
        return self.chain_masks[key]


def _chain_mask(length: int, depth: int, window: int | None) -> Tensor:
    """Returns Bool[length, depth + length]: a chain's queries against the way to it and itself."""
    query = torch.arange(depth, depth + length)[:, None]
    key = torch.arange(depth + length)[None, :]
    mask = key <= query
    if window is None:
        return mask
    return mask & (query - key < window)


def _segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scale: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Attends chain by chain, [1, A, T, D] -> [1, A, T, D]; work is linear in the number of chains.

    Rows are cut by `split`, whose backward is one concatenation: a slice per chain would fill and add a whole
    row's gradient each.
    """
    options = dict(dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    sizes = [chain.length for chain in layout.chains]
    queries, keys, values = (list(part.split(sizes, dim=2)) for part in (query, key, value))
    outputs = []
    for number, chain in enumerate(layout.chains):
        if chain.parent >= 0:
            # Now keys and values of this chain are those of the whole way from the root: its children
            # need them.
            keys[number] = torch.cat([_start(keys[chain.parent], chain.depth), keys[number]], dim=2)
            values[number] = torch.cat([_start(values[chain.parent], chain.depth), values[number]], dim=2)
        mask = None
        if chain.depth or window is not None:
            mask = layout.chain_mask(chain, window)
        outputs.append(
            F.scaled_dot_product_attention(
                queries[number],
                keys[number],
                values[number],
                attn_mask=mask,
                is_causal=mask is None,
                **options,
            )
        )
    return torch.cat(outputs, dim=2)


def _start(way: Tensor, depth: int) -> Tensor:
    """The first `depth` positions of [1, K, T, D]."""
    if way.shape[2] == depth:
        return way
    return way.narrow(2, 0, depth)


def refuse_softcap(softcap: float | None) -> None:
    """Raises ValueError where scores are capped, which no execution of packed rows does."""
    if softcap is not None:
        raise ValueError(
            "packed rows are not supported for models with attention soft-capping; set train.packing=none"
        )


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
    refuse_softcap(softcap)
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
