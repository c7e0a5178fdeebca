"""Global batches depend on (seed, step) alone, every sample is computed exactly once, and every layout
supervises the same tokens.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gdrt_ds.batches import BatchPlan, build_micro_batch
from gdrt_ds.batches.prefix_tree import merge_prefixes
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.errors import UserError

HEAD = 3


def make_store(count: int = 23, seed: int = 0) -> TokenStore:
    rng = np.random.default_rng(seed)
    head = rng.integers(3, 99, HEAD)
    targets = rng.integers(1, 5, count)
    rows = [np.concatenate([head, rng.integers(3, 99, rng.integers(1, 12) + t)]) for t in targets]

    def sums(v):
        return np.concatenate([[0], np.cumsum(v)]).astype(np.int64)

    ids = np.concatenate(rows).astype(np.int32)
    return TokenStore(
        ids,
        sums([len(r) for r in rows]),
        np.zeros(len(ids), np.int8),
        targets.astype(np.int32),
        sums(targets),
    )


def test_the_global_batch_does_not_depend_on_ranks_accumulation_or_packing():
    lengths = make_store(50).lengths
    for step in (0, 3, 11):
        wanted = None
        for world, micro, packed in ((1, 24, True), (2, 4, True), (3, 8, False), (4, 2, True), (5, 3, False)):
            plan = BatchPlan(lengths, 24, micro, world, 7, packed)
            found = sorted(int(s) for slots in plan.step(step) for members in slots for s in members)
            wanted = wanted or found
            assert found == wanted and len(found) == 24 and np.array_equal(plan.samples(step), wanted)
            assert len(plan.step(step)) == plan.accumulation and all(
                len(slots) == world for slots in plan.step(step)
            )
            assert all(
                len(members) <= -(-24 // (world * plan.accumulation))
                for slots in plan.step(step)
                for members in slots
            )
    assert not np.array_equal(
        BatchPlan(lengths, 24, 4, 2, 7).samples(0), BatchPlan(lengths, 24, 4, 2, 8).samples(0)
    )


def test_one_epoch_visits_every_sample_once_and_steps_cross_epochs():
    plan = BatchPlan(np.full(10, 5), 4, 4, 1, 0)
    stream = np.concatenate([plan.samples(step) for step in range(5)])  # 20 = two epochs
    assert np.bincount(stream, minlength=10).tolist() == [2] * 10
    assert len(BatchPlan(np.full(3, 5), 8, 8, 1, 0).samples(0)) == 8  # fewer samples than the global batch


def test_packed_loads_are_balanced_and_padded_rows_share_their_length():
    lengths = np.random.default_rng(1).integers(10, 200, 400)
    packed = BatchPlan(lengths, 64, 4, 4, 0, packed=True)
    padded = BatchPlan(lengths, 64, 4, 4, 0, packed=False)
    for step in range(5):
        loads = np.array([[lengths[m].sum() for m in slots] for slots in packed.step(step)])
        assert loads.max() / loads.mean() < 1.1
        real = sum(lengths[m].sum() for slots in padded.step(step) for m in slots)
        cost = sum(lengths[m].max() * len(m) for slots in padded.step(step) for m in slots)
        naive = sum(lengths[part].max() * len(part) for part in np.array_split(padded.samples(step), 16))
        assert cost < 1.15 * real < naive


def growing_store(num_users: int = 12, windows: int = 6) -> TokenStore:
    """Every user's samples grow from one start: the history of a sample begins that of the next."""
    rng = np.random.default_rng(5)
    rows = []
    for _ in range(num_users):
        items = [rng.integers(3, 90, rng.integers(2, 7)) for _ in range(windows + 1)]
        for count in range(1, windows + 1):
            rows.append(np.concatenate([[1, 2], *items[:count], [91], items[count], [92]]))
    ids = np.concatenate(rows).astype(np.int32)
    targets = np.full(len(rows), 2, np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    starts = np.concatenate([[0], np.cumsum(targets)])
    return TokenStore(ids, offsets, np.zeros(len(ids), np.int8), targets, starts)


def test_samples_that_begin_alike_share_a_slot_and_slots_cost_about_the_same():
    store = growing_store()
    samples = np.arange(len(store))

    def tree_tokens(slots):
        return [len(merge_prefixes([store.row(s) for s in members]).tokens) for members in slots]

    plan = BatchPlan(None, 72, 18, 2, 0, store=store, trees=True)
    slots = [members for step in plan.split(samples) for members in step]
    assert sorted(np.concatenate(slots).tolist()) == samples.tolist()
    assert max(len(members) for members in slots) <= 18
    whole = len(merge_prefixes([store.row(s) for s in samples]).tokens)
    assert sum(tree_tokens(slots)) < 1.15 * whole
    assert max(tree_tokens(slots)) < 1.3 * np.mean(tree_tokens(slots))
    apart = BatchPlan(store.lengths, 72, 18, 2, 0)
    assert sum(tree_tokens([m for step in apart.split(samples) for m in step])) > 1.5 * whole


@pytest.mark.parametrize("count", [1, 2, 5, 37, 72])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_samples_fits_the_slots(count, world):
    store = growing_store()
    plan = BatchPlan(None, 72, 7, world, 0, store=store, trees=True)
    slots = [members for step in plan.split(np.arange(count)) for members in step]
    assert sorted(np.concatenate(slots).tolist()) == list(range(count))
    assert max(len(members) for members in slots) <= 7


def test_impossible_batches_are_refused_with_the_numbers():
    with pytest.raises(UserError, match="global_batch = 3 is smaller than the 4 ranks"):
        BatchPlan(np.full(9, 5), 3, 1, 4, 0)
    with pytest.raises(UserError, match="train split is empty"):
        BatchPlan(np.zeros(0, dtype=np.int64), 4, 1, 2, 0)


@pytest.mark.parametrize("packing", ["none", "packed", "shared_prefix", "prefix_tree"])
def test_supervised_positions_see_the_token_before_their_label(packing):
    store, samples = make_store(), np.array([1, 4, 9, 17])
    micro = build_micro_batch(store, samples, packing, HEAD, 0)
    flat = micro.inputs["input_ids"].reshape(-1)
    before, labels, index = [], [], []
    for s in samples:
        row, n = store.input_ids[store.offsets[s] : store.offsets[s + 1]], store.num_target[s]
        before.append(row[len(row) - n - 1 : -1])
        labels.append(row[-n:])
        index.append(np.arange(store.target_offsets[s], store.target_offsets[s] + n))
    assert (
        micro.labels.tolist() == np.concatenate(labels).tolist()
        and micro.token_index.tolist() == np.concatenate(index).tolist()
    )
    wanted, found = np.concatenate(before), flat[micro.supervised].numpy()
    assert np.array_equal(found, wanted)
    real = sum(int(store.lengths[s]) - 1 for s in samples)
    shared = HEAD * 3 if packing in ("shared_prefix", "prefix_tree") else 0
    assert micro.num_tokens == real - shared
    positions = micro.inputs["position_ids"].reshape(-1)[micro.supervised]
    assert positions.tolist() == [
        int(store.lengths[s]) - 1 - int(store.num_target[s]) + k
        for s in samples
        for k in range(store.num_target[s])
    ]


@pytest.mark.parametrize("packing", ["none", "packed", "shared_prefix", "prefix_tree"])
def test_an_empty_slot_still_runs_a_forward_and_supervises_nothing(packing):
    micro = build_micro_batch(make_store(), np.zeros(0, dtype=np.int64), packing, HEAD, 2)
    assert micro.inputs["input_ids"].tolist() == [
        [2]
    ] and micro.supervised.shape == micro.labels.shape == torch.Size([0])
    assert micro.num_tokens == 0 and len(micro.token_index) == 0


def test_a_sample_that_comes_twice_is_there_twice():
    store = make_store()
    micro = build_micro_batch(store, np.array([5, 5]), "packed", HEAD, 2)
    assert (
        len(micro.labels) == 2 * store.num_target[5]
        and micro.labels[: store.num_target[5]].tolist() == micro.labels[store.num_target[5] :].tolist()
    )
