"""Columns give the same windows, splits, notes, popularity and fingerprint as one Python object per event."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gdrt_ds.config import DataSection
from gdrt_ds.data.columns import WindowTable
from gdrt_ds.data.corpus import Corpus, load_corpus, reader_of, train_popularity
from gdrt_ds.data.popularity import count_in_histories
from gdrt_ds.data.readers.base import BadRows, InteractionColumns, Interactions, Item, Names
from gdrt_ds.errors import UserError
from tests.data import reference_windows
from tests.data.as_lists import as_lists
from tests.data.reference_windows import reference_corpus

NAMES = ("a", "Ü", "日本", "x\x1fy", "-", "🦊", "\ud800", "é", "0", "00")
"""Ids are texts, whatever stands in them: the separators of the digest, lone surrogates, numbers."""


def random_log(seed: int) -> tuple[Interactions, DataSection]:
    """A log with ties, repeated items and duplicates, and settings to cut windows from it."""
    rng = np.random.default_rng(seed)
    num_users = int(rng.integers(1, 7))
    num_items = int(rng.integers(1, 6))
    num_rows = int(rng.integers(1, 70))
    user_ids = [f"{NAMES[k % len(NAMES)]}{k}" for k in range(num_users)]
    item_ids = [f"{NAMES[-k % len(NAMES)]}{k}" for k in range(num_items)]
    users = [user_ids[k] for k in rng.integers(0, num_users, num_rows)]
    items = [item_ids[k] for k in rng.integers(0, num_items, num_rows) ** 2 % num_items]
    times = rng.integers(-3, int(rng.choice([1, 5, 1000])), num_rows).astype(float)
    if rng.random() < 0.3:
        times = times / 7 * 1e9
    if rng.random() < 0.2:
        times = -0.0 * times
    ratings = rng.integers(1, 6, num_rows).astype(float).tolist()
    table = {item: Item(item, f"Title {item}", None, ("g",)) for item in [*item_ids, "unused"]}
    attributes = {user: {"age": str(k)} for k, user in enumerate([*user_ids, "nobody"])}
    log = Interactions(
        users,
        items,
        times.tolist() if rng.random() < 0.75 else None,
        ratings if rng.random() < 0.5 else None,
        table,
        attributes if rng.random() < 0.5 else {},
    )
    settings = {
        "path": "log",
        "history_length": int(rng.choice([1, 2, 3, 10, 300])),
        "min_history": int(rng.choice([1, 1, 2, 4])),
        "kcore": int(rng.choice([0, 0, 2, 3])),
        "min_rating": float(rng.choice([2, 3])) if rng.random() < 0.4 else None,
        "split": str(rng.choice(["time", "leave_one_out"])),
        "split_ratio": [(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.6, 0.0, 0.4)][rng.integers(3)],
        "sample_seed": seed,
    }
    for split in ("train", "valid", "test"):
        if rng.random() < 0.25:
            settings[f"limit_{split}"] = int(rng.integers(1, 30))
    return log, DataSection(**settings)


def from_columns(events: Interactions | InteractionColumns, data: DataSection) -> Corpus:
    """What `load_corpus` makes of a reader's result; it may leave splits empty here."""
    from gdrt_ds.data import corpus as rooms
    from gdrt_ds.data.interactions import make_windows

    windows, notes = make_windows(events, data)
    splits = rooms._finish_splits(windows, data, notes)
    notes += rooms._trained_on(splits)
    corpus = Corpus("log", windows.domain, windows.items, splits, windows.users, notes)
    corpus.fingerprint = rooms._fingerprint(corpus)
    return corpus


def assert_equal(found: Corpus, wanted: Corpus) -> None:
    assert found.notes == wanted.notes
    assert found.items == wanted.items and list(found.items) == list(wanted.items)
    assert found.users == wanted.users
    for split, samples in wanted.splits.items():
        assert isinstance(found.splits[split], WindowTable)
        assert list(found.splits[split]) == samples, split
        assert [found.splits[split][k] for k in range(len(samples))] == samples
    assert found.fingerprint == wanted.fingerprint
    assert train_popularity(found) == reference_windows.train_popularity(wanted)
    train = found.splits["train"]
    assert count_in_histories(train) == Counter(item for sample in train for item in sample.history)


@pytest.mark.parametrize("start", range(0, 600, 100))
def test_random_logs_give_the_windows_and_the_fingerprint_of_the_reference(start):
    refused = 0
    for seed in range(start, start + 100):
        log, data = random_log(seed)
        try:
            wanted = reference_corpus(log, data)
        except UserError as error:
            refused += 1
            with pytest.raises(UserError) as caught:
                from_columns(log, data)
            assert str(caught.value) == str(error)
            continue
        assert_equal(from_columns(log, data), wanted)
    assert refused < 40, "most logs leave something to compare"


@pytest.mark.parametrize(
    "pattern", ["aaaaaaaaaa", "abababababab", "abcabcabcabcabc", "aabaabaab", "abcdabcdeabcd"]
)
@pytest.mark.parametrize("history_length", [1, 2, 3])
def test_items_that_repeat_are_counted_as_stitching_counts_them(pattern, history_length):
    users = [*["u"] * len(pattern), "v", "v", "w"]
    items = {name: Item(name, name) for name in "abcdez"}
    log = Interactions(users, [*pattern, "z", "a", "z"], None, None, items)
    for split in ("time", "leave_one_out"):
        data = DataSection(path="log", history_length=history_length, split=split)
        wanted = reference_corpus(log, data)
        found = from_columns(log, data)
        assert train_popularity(found) == reference_windows.train_popularity(wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kcore": 20, "min_rating": 4, "history_length": 50},
        {"split": "leave_one_out", "limit_train": 5000},
    ],
)
def test_movielens_100k_has_the_windows_and_the_fingerprint_of_the_reference(settings):
    data = DataSection(path="ml-100k", **settings)
    events = reader_of(data).read(data, BadRows(skip=False))
    lists = as_lists(events)
    wanted = reference_corpus(lists, data)
    found = load_corpus(data)
    assert found.notes == wanted.notes
    assert found.fingerprint == wanted.fingerprint
    assert train_popularity(found) == reference_windows.train_popularity(wanted)
    for split in ("train", "valid", "test"):
        assert list(found.splits[split]) == wanted.splits[split]


def test_a_table_of_windows_is_used_like_the_list_that_it_stands_for():
    items = {name: Item(name, name) for name in "abc"}
    log = Interactions(["u", "v", "u"] * 8, [*"abcabcba" * 3], None, None, items)
    table = from_columns(log, DataSection(path="log")).splits["train"]
    samples = list(table)
    assert len(samples) > 12
    assert table == samples and table[-1] == samples[-1] and table[1:4] == samples[1:4]
    assert table[np.int64(2)] == samples[2] and samples[2] in table and table.index(samples[2]) == 2
    with pytest.raises(IndexError):
        table[len(samples)]


def test_names_are_kept_as_they_are():
    names = Names.of(NAMES)
    assert list(names) == list(NAMES) and len(names) == len(NAMES)


def test_an_interaction_of_an_item_without_a_title_is_refused():
    log = Interactions(["u"], ["nowhere"], None, None, {"a": Item("a", "A")})
    with pytest.raises(UserError, match="item id nowhere has no title"):
        from_columns(log, DataSection(path="log"))
