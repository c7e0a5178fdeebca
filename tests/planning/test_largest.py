"""The memory plan is about the largest micro-batch of a run, whatever the data's tail and the packing."""

from __future__ import annotations

import numpy as np
import pytest

from gdrt_ds.batches import BatchPlan
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.planning.largest import FIRST, HEAVIEST, largest_micro_batch, steps_to_deal
from gdrt_ds.planning.plan import plan_run
from gdrt_ds.training.preparation import prepare
from tests.data.test_growing import settings, table

HEAD = 3  # tokens that all prompts begin with


def store_of(lengths: list[int]) -> TokenStore:
    """Rows of these lengths; all begin with the same tokens, and a fifth of each is its target."""
    draw = np.random.default_rng(0)
    rows = [np.concatenate([np.arange(HEAD), draw.integers(HEAD, 9, size - HEAD)]) for size in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    targets = np.array([max(1, size // 5) for size in lengths], dtype=np.int32)
    tokens = np.concatenate(rows).astype(np.int32)
    prefix = np.concatenate([[0], np.cumsum(targets)]).astype(np.int64)
    return TokenStore(tokens, offsets, np.zeros(len(tokens), np.int8), targets, prefix)


def plan_of(store: TokenStore, packing: str) -> BatchPlan:
    lengths = None if packing == "prefix_tree" else store.lengths
    kept = store if packing == "prefix_tree" else None
    packed = packing != "none"
    return BatchPlan(lengths, 16, 4, 2, 0, packed=packed, store=kept, trees=packing == "prefix_tree")


def all_costs(store: TokenStore, plan: BatchPlan, packing: str, steps: int) -> list[tuple[int, int]]:
    """(tokens, target tokens) of every micro-batch of a run, counted from the rows."""
    found = []
    for step in range(steps):
        for members in (part for slots in plan.step(step) for part in slots):
            rows = [store.row(int(sample))[:-1] for sample in members]
            beginnings = {tuple(row[: end + 1].tolist()) for row in rows for end in range(len(row))}
            tokens = {
                "none": len(rows) * max(map(len, rows)),
                "packed": sum(map(len, rows)),
                "shared_prefix": sum(map(len, rows)) - HEAD * (len(rows) - 1),
                "prefix_tree": len(beginnings),
            }
            found.append((tokens[packing], int(store.num_target[members].sum())))
    return found


@pytest.mark.parametrize("packing", ["none", "packed", "shared_prefix", "prefix_tree"])
def test_the_largest_micro_batch_of_data_with_a_tail_is_found(packing):
    lengths = np.random.default_rng(1).integers(8, 14, 1600)
    lengths[np.random.default_rng(2).permutation(1600)[:3]] = (120, 240, 180)
    store = store_of(lengths.tolist())
    plan = plan_of(store, packing)
    costs = all_costs(store, plan, packing, 100)
    tokens, targets = largest_micro_batch(store, plan, HEAD, packing, 100)
    assert len(steps_to_deal(store, plan, 100)) <= FIRST + 2 * HEAVIEST
    assert max(cost for step in range(FIRST) for cost, _ in costs[4 * step : 4 * step + 4]) < tokens
    assert (tokens, targets) == (max(cost for cost, _ in costs), max(count for _, count in costs))
    assert tokens > 3 * np.mean([cost for cost, _ in costs])


def test_a_run_that_ends_before_the_longest_row_is_not_charged_for_it():
    store = store_of([10] * 200)
    plan = plan_of(store, "none")
    late = int(plan.samples(10)[0])
    longer = store_of([400 if sample == late else 10 for sample in range(200)])
    short, long = (largest_micro_batch(longer, plan_of(longer, "none"), HEAD, "none", n) for n in (5, 12))
    assert short[0] == 4 * 9 and long[0] == 4 * 399


def test_growing_rows_are_counted_as_they_are_made(tmp_path):
    config = settings(table(tmp_path / "log", num_users=20), tmp_path, "train.epochs=3")
    prepared = prepare(config)
    plan = plan_run(config, prepared, 2)
    store, batches = prepared.stores["train"], plan.batches
    assert store.rows_change and steps_to_deal(store, batches, plan.steps) == list(range(FIRST))
    sizes = []
    for step in range(FIRST):
        for members in (part for slots in batches.step(step) for part in slots):
            rows = [store.row(int(sample))[:-1] for sample in members]
            sizes.append(len({tuple(row[: end + 1].tolist()) for row in rows for end in range(len(row))}))
    assert plan.packing[0] == "prefix_tree"
    assert f"{max(sizes):,} tokens in the largest micro-batch" in plan.memory.lines()[0]
