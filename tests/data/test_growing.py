"""Windows that grow: the same targets, histories from the data alone, a plan that all ranks agree on."""

from __future__ import annotations

import numpy as np
import pytest

from gdrt_ds.batches import BatchPlan, build_micro_batch
from gdrt_ds.config import DataSection, load_config
from gdrt_ds.data.corpus import Sample, load_corpus
from gdrt_ds.data.growing import stitch
from gdrt_ds.errors import UserError
from gdrt_ds.training.preflight import check_settings
from gdrt_ds.training.preparation import plan_batches, prepare


def table(folder, num_users=9, seed=0, num_items=30):
    """A log whose users have 3 to 14 interactions, with the item table beside it."""
    rng = np.random.default_rng(seed)
    rows = ["user,item,timestamp"]
    for user in range(num_users):
        for item in rng.integers(0, num_items, rng.integers(3, 15)):
            rows.append(f"u{user},i{item},{rng.integers(0, 10**6)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "interactions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    titles = "\n".join(f"i{item},Title {item} of {item % 7}" for item in range(30))
    (folder / "items.csv").write_text("id,title\n" + titles + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return table(tmp_path_factory.mktemp("log"))


def settings(folder, tmp, *more):
    return load_config(
        None,
        [
            f"data.path={folder}",
            f"run.dir={tmp}/run",
            "model.path=tiny-random",
            "prompt.template=plain",
            "train.global_batch=8",
            "train.micro_batch=2",
            "objective=sft",
            "data.windows=growing",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    config = settings(folder, tmp_path_factory.mktemp("run"))
    return config, prepare(config)


def train_samples(folder, **changes):
    return load_corpus(DataSection(path=str(folder), **changes)).split("train")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("block, min_history", [(10, 1), (4, 1), (6, 5), (1, 1)])
def test_every_target_is_there_once_an_epoch_behind_items_that_came_before_it(
    tmp_path, seed, block, min_history
):
    samples = train_samples(table(tmp_path, seed=seed), min_history=min_history)
    windows = stitch(samples, block, min_history, seed=3)
    for epoch in range(3):
        order = windows.order(epoch)
        assert sorted(order.tolist()) == list(range(len(samples)))
        starts = windows.starts(epoch)
        for index, sample in enumerate(samples):
            history = windows.history(index, int(starts[index]))
            assert min_history <= len(history) < min_history + block
            shared = min(len(history), len(sample.history))
            assert history[len(history) - shared :] == sample.history[len(sample.history) - shared :]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("limits", [{}, {"limit_train": 25}, {"history_length": 2, "limit_train": 40}])
@pytest.mark.parametrize("num_items", [3, 30])
def test_windows_over_a_log_give_the_runs_that_stitching_them_one_by_one_gives(
    tmp_path, seed, limits, num_items
):
    samples = train_samples(table(tmp_path, seed=seed, num_items=num_items), **limits)
    found = stitch(samples, 4, 1, seed=3)
    wanted = stitch(list(samples), 4, 1, seed=3)
    assert list(found.runs) == list(wanted.runs)
    assert np.array_equal(found.run_of, wanted.run_of) and np.array_equal(found.place_of, wanted.place_of)
    assert np.array_equal(found.order(2), wanted.order(2))
    assert all(found.history(k, 0) == wanted.history(k, 0) for k in range(len(samples)))


def test_a_block_begins_at_one_item_and_stands_together(folder):
    samples = train_samples(folder)
    windows = stitch(samples, 4, 1, seed=0)
    order = windows.order(0)
    starts = windows.starts(0)
    blocks = [(int(windows.run_of[s]), int(starts[s])) for s in order]
    changes = sum(a != b for a, b in zip(blocks, blocks[1:]))
    assert changes + 1 == len(set(blocks)), "no block is torn apart"
    sizes = [blocks.count(block) for block in set(blocks)]
    assert max(sizes) == 4
    for first, second in zip(order, order[1:]):
        if windows.run_of[first] == windows.run_of[second] and starts[first] == starts[second]:
            assert windows.place_of[second] == windows.place_of[first] + 1


def test_block_starts_and_the_order_move_with_the_epoch_and_follow_the_seed(folder):
    samples = train_samples(folder)
    windows = stitch(samples, 5, 1, seed=0)
    assert any((windows.starts(0) != windows.starts(epoch)).any() for epoch in (1, 2))
    assert windows.order(0).tolist() != windows.order(1).tolist()
    again = stitch(samples, 5, 1, seed=0)
    assert np.array_equal(windows.order(4), again.order(4))
    assert not np.array_equal(windows.order(4), stitch(samples, 5, 1, seed=1).order(4))


def test_a_window_that_continues_nothing_starts_a_run_of_its_own(folder):
    samples = train_samples(folder)
    windows = stitch(samples, 10, 1, seed=0)
    gap = [sample for index, sample in enumerate(samples) if index % 3]
    assert len(stitch(gap, 10, 1, seed=0).runs) > len(windows.runs)


def test_a_missing_window_between_two_of_equal_length_is_a_gap_and_no_history_closes_it():
    """b c d -> e is missing (another split, a sample limit), so e may not be left out of f's history."""
    first = Sample(0, "u", ("a", "b", "c"), "d", 1.0)
    third = Sample(1, "u", ("c", "d", "e"), "f", 3.0)
    windows = stitch([first, third], 3, 1, seed=0)
    assert [run.items for run in windows.runs] == [("a", "b", "c", "d"), ("c", "d", "e", "f")]
    assert windows.history(1, 0) == ("c", "d", "e")


def test_a_short_history_that_equals_a_run_s_end_by_chance_gets_no_later_item():
    """A window file without times, out of order: u bought a a a b a c, and `a` alone is the first item."""
    items = "aaabac"
    windows = [Sample(n, "u", tuple(items[max(0, n - 4) : n]), items[n], None) for n in range(1, 6)]
    shuffled = [windows[place] for place in (3, 0, 4, 1, 2)]
    assert [sample.history for sample in shuffled][1] == ("a",)
    found = stitch(shuffled, 10, 1, seed=0)
    for index, sample in enumerate(shuffled):
        history = found.history(index, 0)
        assert history[-len(sample.history) :] == sample.history
        assert "".join((*history, sample.target)) in items, "no item from later than the target"
    in_order = stitch(windows, 10, 1, seed=0)
    assert [run.items for run in in_order.runs] == [tuple(items)]


def test_items_of_the_other_splits_are_in_no_history_that_reaches_beyond_the_windows(folder):
    corpus = load_corpus(DataSection(path=str(folder)))
    train = corpus.split("train")
    windows = stitch(train, 10, 1, seed=0)
    known = {}
    for sample in train:
        known.setdefault(sample.user_id, set()).update([*sample.history, sample.target])
    for index, sample in enumerate(train):
        assert set(windows.history(index, 0)) <= known[sample.user_id]


@pytest.mark.parametrize("name", ["input_ids", "segments", "offsets", "lengths"])
def test_arrays_of_all_rows_are_refused(name, prepared):
    """Those of the sliding windows would be lengths and tokens of other histories."""
    with pytest.raises(RuntimeError, match=f"no array '{name}'.*Use row"):
        getattr(prepared[1].stores["train"], name)


def test_rows_hold_the_growing_history_and_the_sample_s_own_target(prepared):
    _, found = prepared
    store = found.stores["train"]
    for row in store.order(1)[:20]:
        sample = int(store.sample_of(row))
        ids = store.row(row)
        count = store.num_target[sample]
        first = store.target_offsets[sample]
        sliding = store.sliding.row(sample)
        assert ids[-count:].tolist() == sliding[-count:].tolist()
        micro = build_micro_batch(store, np.array([row]), "prefix_tree", 0, 2)
        assert micro.token_index.tolist() == list(range(first, first + count))
        assert micro.samples.tolist() == [sample]


@pytest.mark.parametrize("packing", ["none", "packed", "prefix_tree"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_agree_on_a_step_whatever_their_number_and_packing_and_steps_cross_epochs(
    prepared, world, packing
):
    config, found = prepared
    store = found.stores["train"]
    plan = plan_batches(config, store, world, packing)
    one = plan_batches(config, store, 1, "prefix_tree")
    taken = []
    for step in range(2 * len(store) // 8 + 1):
        assert np.array_equal(plan.samples(step), one.samples(step))
        slots = [rows for slots in plan.step(step) for rows in slots]
        assert sorted(np.concatenate(slots).tolist()) == plan.samples(step).tolist()
        taken += plan.samples(step).tolist()
    first_two = sorted(taken[: 2 * len(store)]) if len(taken) >= 2 * len(store) else taken
    assert set(range(len(store))) <= set(first_two), "the first epoch is complete"


def test_merged_rows_need_far_fewer_tokens(prepared):
    from gdrt_ds.training.preparation import padding_figures

    config, found = prepared
    store = found.stores["train"]
    tokens = padding_figures(store, plan_batches(config, store, 1, "prefix_tree"), 0)
    assert tokens["prefix_tree"] < 0.75 * tokens["packed"]


def test_padded_rows_of_growing_windows_are_planned_too(prepared):
    config, found = prepared
    store = found.stores["train"]
    plan = BatchPlan(None, 8, 4, 2, 0, packed=False, store=store)
    assert sorted(np.concatenate(plan.step(3)[0]).tolist()) == plan.samples(3).tolist()


def test_the_fingerprint_tells_growing_from_sliding(folder, tmp_path):
    growing = prepare(settings(folder, tmp_path / "a")).stores["train"]
    sliding = prepare(settings(folder, tmp_path / "b", "data.windows=sliding")).stores["train"]
    other = prepare(settings(folder, tmp_path / "c", "train.block_samples=3")).stores["train"]
    assert len({growing.fingerprint, sliding.fingerprint, other.fingerprint}) == 3


@pytest.mark.parametrize(
    "override, problem",
    [
        ("prompt.history=mask", "prompt.history = mask leaves no history"),
        ("dro.excess=true", "dro.excess = True compares"),
        ("dro.excess=runs/sft", "dro.excess = runs/sft compares"),
        ("train.block_samples=11", "train.block_samples = 11 gives histories of up to 11 items"),
    ],
)
def test_what_hangs_on_fixed_histories_is_refused(folder, tmp_path, override, problem):
    with pytest.raises(UserError, match=problem):
        settings(folder, tmp_path, override)


def test_a_second_pass_without_history_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="data.windows = growing with objective = cft"):
        check_settings(settings(folder, tmp_path, "objective=cft"))
