"""Common prefixes are merged once, whatever the rows are."""

from __future__ import annotations

import numpy as np
import pytest

from gdrt_ds.batches.prefix_tree import in_order, merge_prefixes, shared_lengths


def random_rows(seed: int) -> list[np.ndarray]:
    """Rows over few tokens, so that they share prefixes; equal rows and rows of one token occur."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 3, rng.integers(1, 9)) for _ in range(rng.integers(1, 12))]
    rows += [rows[index] for index in rng.integers(0, len(rows), 2)]
    rows += [np.concatenate([rows[0], rng.integers(0, 3, 3)]), rows[0][:1]]
    return [rows[index] for index in rng.permutation(len(rows))]


def check(rows: list[np.ndarray]) -> None:
    tree = merge_prefixes(rows)
    prefixes = {tuple(row[:length].tolist()) for row in rows for length in range(1, len(row) + 1)}
    assert len(tree.tokens) == len(prefixes), "every prefix stands there once"
    for row, path in zip(rows, tree.paths, strict=True):
        assert np.array_equal(tree.tokens[path], row)
        assert np.array_equal(tree.positions[path], np.arange(len(row)))
    index = np.arange(len(tree.tokens))
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < tree.end[None, :])
    for path in tree.paths:
        for depth, query in enumerate(path):
            assert np.flatnonzero(visible[query]).tolist() == sorted(path[: depth + 1].tolist())
    assert sum(chain.length for chain in tree.chains) == len(tree.tokens)
    starts = np.cumsum([0] + [chain.length for chain in tree.chains])
    for number, chain in enumerate(tree.chains):
        assert chain.parent < number
        seen = np.flatnonzero(visible[starts[number]]) if chain.length else []
        assert len(seen) == chain.depth + 1
        if chain.parent >= 0:
            parent = tree.chains[chain.parent]
            assert chain.depth <= parent.depth + parent.length


@pytest.mark.parametrize("seed", range(200))
def test_any_rows_are_found_along_their_paths_and_see_their_own_prefix_only(seed):
    check(random_rows(seed))


@pytest.mark.parametrize(
    "rows",
    [
        [[1]],
        [[1], [1]],
        [[1, 2, 3], [1, 2], [1]],
        [[1, 2], [1, 2, 3], [1, 2, 4], [5]],
        [[1, 2, 3, 4], [1, 2, 9], [1, 2, 9, 8], [1, 2, 3, 5], [1, 7]],
    ],
)
def test_small_trees(rows):
    check([np.array(row) for row in rows])


def test_no_rows_give_an_empty_tree():
    tree = merge_prefixes([])
    assert len(tree.tokens) == len(tree.chains) == 0


def test_windows_that_grow_from_one_item_share_a_trunk():
    """head + 1..k items, then an answer of its own each: the items are there once."""
    head = [90, 91]
    rows = [np.array(head + list(range(k)) + [99, 50 + k]) for k in range(1, 6)]
    tree = merge_prefixes(rows)
    assert len(tree.tokens) == len(head) + 5 + 2 * 5
    assert len(tree.chains) == 5
    assert [chain.parent for chain in tree.chains] == [-1, 0, 0, 0, 0]


def test_the_longest_row_is_one_chain():
    tree = merge_prefixes([np.array([1, 2, 3, 4, 5]), np.array([1, 2, 9]), np.array([1, 8])])
    assert tree.chains[0].length == 5


def test_rows_that_begin_alike_stand_together_in_order():
    rows = [np.array([2, 1]), np.array([1, 1]), np.array([2, 1, 3]), np.array([1])]
    assert in_order(rows) == [3, 1, 0, 2]
    assert shared_lengths([rows[index] for index in in_order(rows)]).tolist() == [0, 1, 0, 2]
