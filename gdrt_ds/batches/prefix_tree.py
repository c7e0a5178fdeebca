"""Merges the common prefixes of token rows: a tree in which every token is computed once.

Rows that begin alike share tokens: prompts share their start, and windows of one user that grow from the same
item share their history. The tree is made of chains, runs of tokens without a branch in between. A chain
hangs at some depth of its parent chain. The longest row of a group is its trunk, so that attention works
on few long pieces instead of many short ones.

    rows            a b c d e      a b c x      a b y
    chains          0: a b c d e   1: x, at depth 3 of chain 0   2: y, at depth 2 of chain 0
    in the row      a b c d e x y

Tokens stand in depth-first order: a chain, then the chains that hang on it, the deepest first. So the
subtree of every token is one contiguous piece, which is what the visibility rule of tree_attention.py
needs.

Shapes: n rows; T tokens of the tree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Chain:
    """A run of tokens.

    Attributes:
        length: its tokens; 0 only in an empty tree.
        parent: number of the chain that it hangs on; -1 = none.
        depth: tokens on the way from the root to it. They are the first `depth` tokens of its parent's path.
    """

    length: int
    parent: int = -1
    depth: int = 0


@dataclass
class PrefixTree:
    """Rows merged by their common prefixes.

    Attributes:
        tokens: int64[T], depth first.
        end: int64[T], exclusive end of each token's subtree.
        positions: int64[T], depth of each token: its position in every row that holds it.
        chains: in the order of the tokens; a chain's parent comes before it.
        paths: per row int64[tokens of the row]: where each of its tokens stands in `tokens`.
    """

    tokens: np.ndarray
    end: np.ndarray
    positions: np.ndarray
    chains: list[Chain] = field(default_factory=list)
    paths: list[np.ndarray] = field(default_factory=list)


def shared_lengths(rows: list[np.ndarray]) -> np.ndarray:
    """Returns int64[n]: how many tokens each row has in common with the row before it; 0 for the first."""
    shared = np.zeros(len(rows), dtype=np.int64)
    for index in range(1, len(rows)):
        before = rows[index - 1]
        row = rows[index]
        length = min(len(before), len(row))
        different = np.flatnonzero(before[:length] != row[:length])
        shared[index] = different[0] if len(different) else length
    return shared


def in_order(rows: list[np.ndarray]) -> list[int]:
    """Returns the numbers of the rows in lexicographic order: rows that begin alike stand together."""
    return sorted(range(len(rows)), key=lambda index: rows[index].tolist())


def merge_prefixes(rows: list[np.ndarray]) -> PrefixTree:
    """Returns the tree of the rows; any rows: equal ones, prefixes of one another, none at all.

    Args:
        rows: integer arrays of one dimension.
    """
    order = in_order(rows)
    ordered = [np.asarray(rows[index], dtype=np.int64) for index in order]
    builder = _Builder(ordered, shared_lengths(ordered))
    if ordered:
        builder.add(0, len(ordered), 0, -1, np.zeros(0, dtype=np.int64))
    paths: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(rows)
    for place, index in enumerate(order):
        paths[index] = builder.paths[place]
    return PrefixTree(
        tokens=np.concatenate([np.zeros(0, dtype=np.int64), *builder.tokens]),
        end=np.concatenate([np.zeros(0, dtype=np.int64), *builder.ends]),
        positions=np.concatenate([np.zeros(0, dtype=np.int64), *builder.positions]),
        chains=builder.chains,
        paths=paths,
    )


class _Builder:
    """Lays rows that are in order out as chains, from the root down."""

    def __init__(self, rows: list[np.ndarray], shared: np.ndarray):
        self.rows = rows
        self.shared = shared
        self.tokens: list[np.ndarray] = []
        self.ends: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.chains: list[Chain] = []
        self.paths: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(rows)
        self.total = 0

    def add(self, first: int, stop: int, depth: int, parent: int, path: np.ndarray) -> None:
        """Lays out the rows first .. stop - 1, which have `depth` tokens in common that stand at `path`."""
        trunk = max(range(first, stop), key=lambda row: len(self.rows[row]))
        own = self.rows[trunk][depth:]
        start = self.total
        number = len(self.chains)
        self.chains.append(Chain(len(own), parent, depth))
        self.tokens.append(own)
        self.positions.append(np.arange(depth, depth + len(own)))
        ends = np.zeros(len(own), dtype=np.int64)
        self.ends.append(ends)
        self.total += len(own)
        whole = np.concatenate([path, np.arange(start, start + len(own))])
        self.paths[trunk] = whole
        below = len(own) + depth
        for leave, group in self._groups(first, stop, trunk):
            ends[leave - depth : below - depth] = self.total
            below = leave
            self._add_group(group, leave, number, whole[:leave])
        ends[: below - depth] = self.total

    def _groups(self, first: int, stop: int, trunk: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """The rows beside the trunk by the depth at which they leave it, the deepest first.

        Returns:
            (depth, ranges of rows that go on alike) of each depth.
        """
        leaves: dict[int, list[tuple[int, int]]] = {}
        for rows in (range(trunk - 1, first - 1, -1), range(trunk + 1, stop)):
            leave = len(self.rows[trunk])
            for row in rows:
                nearer = row + 1 if row < trunk else row  # of this row and the one towards the trunk
                with_next = int(self.shared[nearer])
                together = with_next > leave
                leave = min(leave, with_next)
                ranges = leaves.setdefault(leave, [])
                if together:
                    low, high = ranges[-1]
                    ranges[-1] = (min(low, row), max(high, row + 1))
                else:
                    ranges.append((row, row + 1))
        return sorted(leaves.items(), reverse=True)

    def _add_group(self, ranges: list[tuple[int, int]], depth: int, parent: int, path: np.ndarray) -> None:
        for first, stop in sorted(ranges):
            if len(self.rows[first]) == depth and stop == first + 1:
                self.paths[first] = path  # the row ends on its parent chain
                continue
            self.add(first, stop, depth, parent, path)
