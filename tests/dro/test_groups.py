"""Target tokens find their groups.

Bins of relevance or popularity, labels, positions, and shuffled controls of the same sizes.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from gdrt_ds.config import GroupsSection
from gdrt_ds.data.corpus import Sample
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.data.recommendation import Recommendation
from gdrt_ds.data.token_facts import whole
from gdrt_ds.data.training_data import Auxiliary
from gdrt_ds.dro.groups import UNSEEN, GroupPlan, apply_groups, bin_edges, fit_groups
from gdrt_ds.errors import UserError

NUM = 60


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    entries = [SimpleNamespace(train_count=k + 1, provider=["A", "A", "B", None][k % 4]) for k in range(12)]
    catalogue = SimpleNamespace(entries=entries, index_of={f"i{k}": k for k in range(12)})
    samples = [
        Sample(
            s,
            f"u{s % 7}",
            ("i0",),
            f"i{rng.integers(12)}",
            None,
            {"kind": "history" if s % 5 == 0 else "shortcut"},
        )
        for s in range(NUM)
    ]
    corpus = SimpleNamespace(
        splits={"train": samples},
        split=lambda name: samples,
        users={f"u{k}": {"gender": "FM"[k % 2]} for k in range(7)},
    )
    num_target = rng.integers(1, 5, NUM).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(num_target)]).astype(np.int64)
    store = TokenStore(
        np.zeros(offsets[-1], np.int32), offsets, np.zeros(offsets[-1], np.int8), num_target, offsets
    )
    return corpus, catalogue, samples, store, rng.normal(-4, 2, offsets[-1]).astype(np.float32)


def fit(world, **settings):
    corpus, catalogue, samples, store, relevance = world
    section = GroupsSection(**settings)
    data = Recommendation(corpus, catalogue, None, None, {"train": store})
    plan = fit_groups(section, data, relevance, 0)
    return plan, whole(apply_groups(plan, section, data, relevance, "train"))


def test_quantile_bins_of_relevance_are_even_and_ordered(world):
    plan, groups = fit(world, num=4)
    relevance = world[4]
    assert (
        groups.dtype == np.int16
        and max(plan.counts) - min(plan.counts) <= 1
        and sum(plan.counts) == len(relevance)
    )
    for low, high in zip(range(3), range(1, 4)):
        assert relevance[groups == low].max() < plan.edges[low] <= relevance[groups == high].min()
    assert (
        plan.edges == sorted(plan.edges)
        and len(plan.names()) == 4
        and plan.names()[0].startswith("r in [-inf")
    )


def test_uniform_bins_have_equal_width():
    edges = bin_edges(np.linspace(0, 100, 100001), 5, "uniform")
    assert np.allclose(np.diff(edges), edges[1] - edges[0]) and edges[0] == pytest.approx(20, abs=0.5)


def test_random_groups_have_the_sizes_of_relevance_groups_and_no_meaning(world):
    wanted, relevance = fit(world, num=4)
    plan, groups = fit(world, num=4, by="random")
    assert plan.counts == wanted.counts and not np.array_equal(groups, relevance)
    assert np.array_equal(groups, fit(world, num=4, by="random")[1])  # seeded
    means = [world[4][groups == g].mean() for g in range(4)]
    assert np.ptp(means) < 0.5 * np.ptp([world[4][relevance == g].mean() for g in range(4)])


def test_popularity_position_and_labels_follow_the_sample(world):
    corpus, catalogue, samples, store, _ = world
    owner = np.repeat(np.arange(NUM), store.num_target)
    plan, groups = fit(world, num=3, by="item_popularity")
    counts = np.array([catalogue.entries[catalogue.index_of[s.target]].train_count for s in samples])[owner]
    assert np.array_equal(groups, np.searchsorted(plan.edges, counts, side="right"))
    plan, groups = fit(world, num=3, by="position")
    place = np.arange(len(owner)) - store.target_offsets[owner]
    assert np.array_equal(groups, np.minimum(place, 2)) and plan.names()[-1] == "token 3 and later"
    plan, groups = fit(world, num=8, by="column", column="kind")
    assert plan.labels == ["shortcut", "history"] and np.array_equal(
        groups == 1, np.array([s.labels["kind"] == "history" for s in samples])[owner]
    )
    plan, groups = fit(world, num=8, by="user_attribute", column="gender")
    assert set(plan.labels) == {"F", "M"} and plan.num == 2
    plan, groups = fit(world, num=2, by="provider")
    names = Counter(catalogue.entries[catalogue.index_of[s.target]].provider or "(unknown)" for s in samples)
    assert (
        plan.labels == [max(sorted(names), key=lambda n: names[n]), "(other)"] or plan.labels[1] == "(other)"
    )
    assert plan.counts[0] == sum(
        int(n)
        for s, n in zip(samples, store.num_target)
        if (catalogue.entries[catalogue.index_of[s.target]].provider or "(unknown)") == plan.labels[0]
    )


def test_a_provider_of_titles_that_are_never_targets_of_train_is_in_no_group(world):
    corpus, catalogue, samples, store, relevance = world
    entries = [*catalogue.entries, SimpleNamespace(train_count=0, provider="C")]
    more = SimpleNamespace(entries=entries, index_of={**catalogue.index_of, "i12": 12})
    plan, groups = fit((corpus, more, samples, store, relevance), num=4, by="provider")
    before, alone = fit(world, num=4, by="provider")
    assert "C" not in plan.labels
    assert plan.counts == before.counts == np.bincount(alone).tolist()
    assert np.array_equal(groups, alone)


def test_a_label_that_train_lacks_is_in_no_group_unless_there_is_one_for_others(world):
    corpus, catalogue, samples, store, _ = world
    odd = [replace(samples[0], labels={"kind": "new"}), *samples[1:]]
    splits = {"train": samples, "valid": odd}
    corpus = SimpleNamespace(splits=splits, split=splits.get, users=corpus.users)
    data = Recommendation(corpus, catalogue, None, None, {"train": store, "valid": store})
    section = GroupsSection(num=3, by="column", column="kind")
    plan = fit_groups(section, data, None, 0)
    found = whole(apply_groups(plan, section, data, None, "valid"))
    first = int(store.num_target[0])
    assert (found[:first] == UNSEEN).all() and (found[first:] >= 0).all()
    plan.labels = ["shortcut", "(other)"]
    assert (whole(apply_groups(plan, section, data, None, "valid"))[:first] == 1).all()


def test_a_label_with_the_name_of_the_group_for_others_is_refused(world):
    corpus, catalogue, samples, store, relevance = world
    odd = [replace(samples[0], labels={"kind": "(other)"}), *samples[1:]]
    splits = {"train": odd}
    corpus = SimpleNamespace(splits=splits, split=splits.get, users=corpus.users)
    with pytest.raises(UserError, match=r"have a label '\(other\)'"):
        fit((corpus, catalogue, odd, store, relevance), num=3, by="column", column="kind")


def test_two_quantile_groups_of_which_one_would_have_all_tokens_are_refused(world):
    """The one edge is the smallest value, and nothing lies below it: that would be SFT without a word."""
    corpus, catalogue, samples, store, relevance = world
    same = relevance.copy()
    same[: int(len(same) * 0.7)] = same.min()
    with pytest.raises(UserError, match="groups.num = 2 .*some groups would be empty"):
        fit((corpus, catalogue, samples, store, same), num=2)
    few = relevance.copy()
    few[: int(len(few) * 0.3)] = few.min()
    plan, _ = fit((corpus, catalogue, samples, store, few), num=4)
    assert plan.counts[0] == 0 and min(plan.counts[1:]) > 0  # the rest are groups


def test_relevance_of_a_token_is_looked_up_by_entry_and_place(world):
    corpus, catalogue, samples, _, _ = world
    num = np.array([3, 1, 2] * 4)
    offsets = np.concatenate([[0], np.cumsum(num)])
    r = np.arange(offsets[-1]).astype(np.float32)
    targets = np.array([num[catalogue.index_of[s.target]] for s in samples], np.int32)
    sums = np.concatenate([[0], np.cumsum(targets)]).astype(np.int64)
    store = TokenStore(np.zeros(sums[-1], np.int32), sums, np.zeros(sums[-1], np.int8), targets, sums)
    wanted = np.concatenate(
        [np.arange(offsets[e], offsets[e + 1]) for e in (catalogue.index_of[s.target] for s in samples)]
    )
    entry_of = {"train": np.array([catalogue.index_of[s.target] for s in samples])}
    table = TokenStore(np.zeros(0, np.int32), offsets, np.zeros(0, np.int8), num, offsets)
    assert np.array_equal(Auxiliary(table, entry_of, "titles").per_token(r, "train", store), wanted)


def test_groups_by_length_put_short_targets_before_long_ones(world):
    plan, groups = fit(world, num=3, by="length")
    lengths = np.repeat(world[3].num_target, world[3].num_target)
    assert groups.min() == 0 and (np.diff(groups[np.argsort(lengths, kind="stable")]) >= 0).all()
    assert plan.names()[0].startswith("length in [-inf")


def test_labels_of_the_rows_are_not_sought_in_windows_over_a_catalogue(world):
    with pytest.raises(UserError, match="groups.by = label: windows over a catalogue have no labels"):
        fit(world, num=3, by="label")


def test_groups_that_the_data_cannot_fill_are_refused(world):
    corpus, catalogue, samples, store, relevance = world
    with pytest.raises(UserError, match="groups.num = 9999 is more than"):
        fit(world, num=9999)
    flat = (corpus, catalogue, samples, store, np.zeros_like(relevance))
    with pytest.raises(UserError, match="only 1 distinct values"):
        fit(flat, num=4)
    with pytest.raises(UserError, match="available: gender"):
        fit(world, num=4, by="user_attribute", column="age")
    with pytest.raises(UserError, match="available: kind"):
        fit(world, num=4, by="column", column="genre")


def test_the_plan_survives_its_file(world, tmp_path):
    plan, _ = fit(world, num=4)
    plan.save(tmp_path / "groups.json")
    assert (
        GroupPlan.load(tmp_path / "groups.json") == plan
        and len(json.loads((tmp_path / "groups.json").read_text())["names"]) == 4
    )
