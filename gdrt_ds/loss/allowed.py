"""Softmax over the next tokens that a catalogue trie has (MSL, SIGIR 2025), and over no others.

A row at trie node n may only choose among the children of n. Rows whose node has one child have loss 0 and
no gradient, whatever the model says, and never reach the head. The others are sorted by the number of
children and cut into chunks; a chunk multiplies only the union of its rows' allowed head rows. On
Amazon-like catalogues the root has thousands of children and almost all other nodes have few, so the two
kinds never share a chunk.

Shapes: N supervised tokens, M trie nodes, K = offsets[M] (node, token) pairs, C rows of a chunk, U union of
their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from gdrt_ds.errors import UserError
from gdrt_ds.runtime.devices import to_device


class AllowedTokens(NamedTuple):
    """Which tokens each row may choose.

    Row i has tokens[offsets[node[i]] : offsets[node[i] + 1]], without repetition. Keep the three tensors on
    the CPU: the chunks are planned there, and a CUDA tensor would cost a host synchronisation.
    """

    node: torch.Tensor  # [N] integer
    offsets: torch.Tensor  # [M + 1] integer, ascending from 0
    tokens: torch.Tensor  # [K] integer in [0, V)


@dataclass
class AllowedChunk:
    """Rows that share a gathered head."""

    rows: torch.Tensor  # [C] long, on the device
    tokens: torch.Tensor  # [U] long, ascending, on the device
    node_slot: torch.Tensor  # [C] long: row of `forbidden` for each row
    # [distinct nodes, U] bool, True = may not be chosen; None: every row may choose every token of the union.
    forbidden: torch.Tensor | None


@dataclass
class AllowedPlan:
    """All rows of a call: those that reach the head, in chunks, and those that have no choice."""

    chunks: list[AllowedChunk]
    single_rows: torch.Tensor  # [S] long: rows whose node has exactly one child
    single_tokens: torch.Tensor  # [S] long: that child


def plan_allowed(
    allowed: AllowedTokens, num_rows: int, vocabulary: int, chunk_bytes: int, bytes_per_logit: int, device
) -> AllowedPlan:
    """Cuts N rows into chunks of similar allowed sizes.

    Args:
        allowed: what each row may choose.
        num_rows: N.
        vocabulary: rows of the head.
        chunk_bytes: budget for the logits of a chunk.
        bytes_per_logit: what one logit takes of it.
        device: where the chunks are used.

    Raises:
        UserError: a shape is wrong, a node or token is out of range, or a node has no children.
    """
    node = allowed.node.detach().cpu().numpy().astype(np.int64, copy=False)
    offsets = allowed.offsets.detach().cpu().numpy().astype(np.int64, copy=False)
    tokens = allowed.tokens.detach().cpu().numpy().astype(np.int64, copy=False)
    if node.shape != (num_rows,):
        raise UserError(
            f"allowed.node has shape {node.shape}, but there are {num_rows} rows",
            "give one trie node per supervised token",
        )
    if num_rows and (node.min() < 0 or node.max() >= len(offsets) - 1):
        raise UserError(
            f"allowed.node holds nodes {node.min()}..{node.max()}, but offsets describe nodes "
            f"0..{len(offsets) - 2}",
            "use nodes of the trie that offsets and tokens come from",
        )
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocabulary):
        raise UserError(
            f"allowed.tokens holds ids {tokens.min()}..{tokens.max()}, but the head has {vocabulary} rows",
            "tokenise the catalogue with the model's tokenizer",
        )
    size = offsets[node + 1] - offsets[node]
    if num_rows and size.min() < 1:
        row = int(size.argmin())
        raise UserError(
            f"row {row} is at trie node {node[row]}, which allows no token",
            "a supervised token needs a node with children; leaves have none",
        )
    single = np.flatnonzero(size == 1)
    rest = np.flatnonzero(size > 1)
    # Size classes of a factor 4: a chunk's union is then at most 4 x (distinct nodes) larger than what its
    # smallest row needs.
    size_class = np.log2(np.maximum(size, 1)).astype(np.int64) // 2
    rest = rest[np.lexsort((rest, node[rest], -size_class[rest]))]
    chunks = []
    start = 0
    while start < len(rest):
        stop = start
        union = 0
        last = -1
        while stop < len(rest) and size_class[rest[stop]] == size_class[rest[start]]:
            row = rest[stop]
            union_next = union
            if node[row] != last:
                union_next += size[row]
            too_big = (stop - start + 1) * min(union_next, vocabulary) * bytes_per_logit > chunk_bytes
            # Many small nodes in one chunk would make the product quadratic: at most 256 rows unless they
            # share one node.
            too_mixed = stop - start >= 256 and node[row] != last
            if stop > start and (too_big or too_mixed):
                break
            union = union_next
            last = node[row]
            stop += 1
        chunks.append(_chunk(rest[start:stop], node, offsets, tokens, device))
        start = stop
    only_children = tokens[offsets[node[single]]]
    return AllowedPlan(chunks, to_device(single, device), to_device(only_children, device))


def _chunk(
    rows: np.ndarray, node: np.ndarray, offsets: np.ndarray, tokens: np.ndarray, device
) -> AllowedChunk:
    nodes, node_slot = np.unique(node[rows], return_inverse=True)
    parts = [tokens[offsets[n] : offsets[n + 1]] for n in nodes]
    union = np.unique(np.concatenate(parts))
    forbidden = None
    if len(nodes) > 1:
        forbidden = np.ones((len(nodes), len(union)), dtype=bool)
        for slot, part in enumerate(parts):
            forbidden[slot, np.searchsorted(union, part)] = False
    return AllowedChunk(
        to_device(rows, device),
        to_device(union, device),
        to_device(node_slot.reshape(-1), device),
        None if forbidden is None else to_device(forbidden, device),
    )
