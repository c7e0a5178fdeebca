"""FlexAttention over packed rows: few lengths, few compiled graphs, block masks made from the layout.

FlexAttention is fast where it is compiled, and it is compiled again for every new length. So rows are padded
to a few lengths, inside the attention alone. Where more graphs are needed than MOST_GRAPHS the run ends with
an error: torch would otherwise fall back to the unfused attention without a word, which writes all scores.

The block mask, which says what blocks of 128 x 128 scores are computed, is made from the layout on the host
in (T / 128)^2 steps. torch's own `create_block_mask` evaluates the rule for all T^2 scores on the device.

Shapes: T tokens of a row, S padded tokens, R = S / 128 blocks, A query heads, K key heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gdrt_ds.errors import UserError
from gdrt_ds.runtime.devices import to_device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from gdrt_ds.batches.tree_attention import TreeLayout

BLOCK = 128  # FlexAttention's own block size; its kernels skip a block or compute it
SMALLEST = 256
MOST_GRAPHS = 32
"""One graph per length, window and dtype, with and without gradients. A run needs a few: the batch plan
balances micro-batches, and the lengths between 256 and 16,384 are 13."""


def padded_length(length: int) -> int:
    """Returns the next of 256, 384, 512, 768, 1024, ...: powers of two and the numbers half way."""
    size = SMALLEST
    while size < length:
        is_power = size & (size - 1) == 0
        size = size * 3 // 2 if is_power else size * 4 // 3
    return size


def block_mask_bytes(length: int, windows: int = 1) -> int:
    """Returns what the block masks of one row keep on the device while its layers run.

    Args:
        length: T.
        windows: how many different windows the layers have; one mask is kept for each.
    """
    size = padded_length(length)
    blocks = size // BLOCK
    indices = 4 * (blocks * blocks + blocks) * 4  # keys per query and queries per key, partial and full
    rule = 2 * size * 8  # end and positions
    return windows * (indices + rule)


def visible_blocks(end: Tensor, positions: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Which blocks hold a score that is needed, by the rule of tree_attention.py.

    Args:
        end, positions: Long[S] on the CPU.
        window: sliding window in positions; None = unlimited.

    Returns:
        (partial, full), both Bool[R, R] for (query block, key block). In a full block every score is needed,
        so the rule is not evaluated there. With a window a partial block may turn out to be empty.
    """
    end_RB = end.view(-1, BLOCK)
    first = torch.arange(len(end_RB)) * BLOCK
    last = first + BLOCK - 1
    earlier = first[None, :] < first[:, None]
    # A key block that ends before the query block begins has all its keys before all the queries, so only
    # the ends of the subtrees decide.
    some = earlier & (end_RB.amax(1)[None, :] > first[:, None])
    full = earlier & (end_RB.amin(1)[None, :] > last[:, None])
    some |= torch.eye(len(end_RB), dtype=torch.bool)  # every token sees itself
    if window is not None:
        positions_RB = positions.view(-1, BLOCK)
        nearest = positions_RB.amin(1)[:, None] - positions_RB.amax(1)[None, :]
        furthest = positions_RB.amax(1)[:, None] - positions_RB.amin(1)[None, :]
        some &= nearest < window
        full &= furthest < window
    return some & ~full, full


def layout_block_mask(layout: TreeLayout, window: int | None, device: torch.device) -> BlockMask:
    """Returns the block mask of a layout; it is made once per window and kept with the layout."""
    if window not in layout.block_masks:
        layout.block_masks[window] = _make_block_mask(layout, window, device)
    return layout.block_masks[window]


def _make_block_mask(layout: TreeLayout, window: int | None, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    end, positions = layout.host_rule()
    size = padded_length(len(end))
    # A padding token sees itself alone: a row without any key would be 0 / 0.
    padding = torch.arange(len(end), size)
    end = torch.cat([end, padding + 1])
    positions = F.pad(positions, (0, size - len(positions)))
    partial, full = visible_blocks(end, positions, window)
    parts = [*_ordered(partial), *_ordered(full), *_ordered(partial.T), *_ordered(full.T)]
    rule = _rule(to_device(end, device), to_device(positions, device), window)
    tensors = [to_device(part, device) for part in parts]
    return BlockMask((size, size), *tensors, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=rule)


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention's form of Bool[R, R]: how many blocks per row [1, 1, R], and which first [1, 1, R, R].

    The kernels on a GPU read the indices as if they were contiguous, whatever their strides say. Those of a
    transposed matrix are not: then the gradients of keys and values are those of other blocks.
    """
    counts = dense.sum(-1, dtype=torch.int32)
    indices = torch.argsort(dense.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].contiguous(), indices[None, None].contiguous()


def _rule(end: Tensor, positions: Tensor, window: int | None) -> Callable:
    """The rule as FlexAttention wants it, for single numbers of a query and a key."""

    def in_tree(batch, head, q, k):
        return (k <= q) & (q < end[k])

    def in_tree_and_window(batch, head, q, k):
        return (k <= q) & (q < end[k]) & (positions[q] - positions[k] < window)

    return in_tree if window is None else in_tree_and_window


@functools.cache
def compiled_flex(backend: str | Callable = "inductor") -> Callable:
    """Returns FlexAttention compiled by a backend of torch.compile, one graph per length."""
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph makes a graph too many an error, where torch would go on uncompiled.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=backend)


@torch.compiler.disable  # model.compile=true traces the layers, and a layout is another in every batch
def flex_rows(
    query: Tensor,  # [1, A, T, D]
    key: Tensor,  # [1, K, T, D]
    value: Tensor,  # [1, K, T, D]
    layout: TreeLayout,
    scale: float | None,
    window: int | None,
    call: Callable | None = None,
) -> Tensor:
    """Attention of one packed row as one FlexAttention call, [1, A, T, D].

    Args:
        layout: of the row.
        scale: of the scores; None = 1 / sqrt(D).
        window: of this layer; None = unlimited.
        call: what computes it; None = FlexAttention, compiled.

    Raises:
        UserError: the run needs more than MOST_GRAPHS graphs.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit

    length = query.shape[2]
    mask = layout_block_mask(layout, window, query.device)
    rows = [_pad(part, mask.seq_lengths[0]) for part in (query, key, value)]
    options = dict(block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    if call is None:
        call = compiled_flex()
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
            output = call(*rows, **options)
    except FailOnRecompileLimitHit as error:
        raise UserError(
            f"attention: FlexAttention needs more than {MOST_GRAPHS} compiled graphs; the last row has "
            f"{length} tokens, padded to {mask.seq_lengths[0]}",
            "set model.attention=tree_sdpa, which compiles nothing, or lower train.micro_batch or "
            "prompt.max_length so that rows have fewer lengths",
        ) from error
    return output[:, :, :length]


def _pad(part: Tensor, size: int) -> Tensor:
    """[1, heads, T, D] -> [1, heads, S, D], zeros behind."""
    if part.shape[2] == size:
        return part
    return F.pad(part, (0, 0, 0, size - part.shape[2]))
