"""Tokens laid together from pieces are those of samples encoded one by one; facts by case those by token."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from gdrt_ds.batches import BatchPlan, build_micro_batch
from gdrt_ds.batches.plan import permutation
from gdrt_ds.config import DataSection, load_config
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.coded_windows import CodedWindows
from gdrt_ds.data.corpus import Corpus
from gdrt_ds.data.interactions import make_windows
from gdrt_ds.data.prompts import PromptEncoder, TokenStore, common_head
from gdrt_ds.data.readers.base import InteractionColumns, Interactions, Item, Names
from gdrt_ds.data.recommendation import control_history
from gdrt_ds.data.templates import PromptTemplate
from gdrt_ds.data.token_facts import ByEntry, ByPlace, BySample, distinct, group_counts, quantiles
from gdrt_ds.data.window_store import tokenise_split
from gdrt_ds.models.built_in import TINY_NAME
from gdrt_ds.models.source import load_tokenizer, resolve_model
from tests.data.reference_tokens import tokenise_split as reference_split

WORDS = "red green blue old new long short story of the sea".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = resolve_model(TINY_NAME, tiny_folder=tmp_path_factory.mktemp("tiny"), texts=WORDS, seed=0)
    return load_tokenizer(folder)


def world(seed: int, tokenizer, max_length: int = 400):
    """Samples of a random log, as a table and as a list, with a catalogue and an encoder."""
    rng = np.random.default_rng(seed)
    titles = [" ".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(9)]
    items = {f"i{k}": Item(f"i{k}", title) for k, title in enumerate(titles)}
    num = 60
    users = [f"u{k}" for k in rng.integers(0, 5, num)]
    log = Interactions(users, [f"i{k}" for k in rng.integers(0, 9, num)], None, None, items)
    data = DataSection(path="log", history_length=int(rng.choice([1, 4, 12])))
    windows, _ = make_windows(log, data)
    table = windows.splits["train"]
    corpus = Corpus("log", "item", windows.items, windows.splits)
    catalogue = Catalogue.build(corpus)
    config = load_config(None, ["prompt.template=plain"])
    template = PromptTemplate.from_config(config.prompt, "item", tokenizer)
    return table, catalogue, PromptEncoder(template, tokenizer, max_length)


@pytest.mark.parametrize("max_length", [400, 150, 130])
@pytest.mark.parametrize("seed", range(5))
def test_tokens_and_notes_are_those_of_samples_encoded_one_by_one(tokenizer, seed, max_length):
    table, catalogue, encoder = world(seed, tokenizer, max_length)
    wanted, notes = reference_split(encoder, catalogue, table)
    for samples in (table, list(table)):
        store, found = tokenise_split(encoder, catalogue, CodedWindows.of(samples, catalogue))
        assert found == notes
        assert_same(store, wanted)


def assert_same(store: TokenStore, wanted: TokenStore) -> None:
    assert store.input_ids.tolist() == wanted.input_ids.tolist()
    assert store.segments.tolist() == wanted.segments.tolist()
    assert store.offsets.tolist() == wanted.offsets.tolist()
    assert store.num_target.tolist() == wanted.num_target.tolist()
    assert store.target_offsets.tolist() == wanted.target_offsets.tolist()
    assert store.lengths.tolist() == wanted.lengths.tolist()
    assert store.fingerprint == wanted.fingerprint
    for sample in range(len(wanted)):
        assert store.row(sample).tolist() == wanted.row(sample).tolist()
    for chosen in ([], [2], [3, 0, 3, len(wanted) - 1]):
        rows = [row.tolist() for row in store.rows(np.array(chosen, dtype=np.int64))]
        assert rows == [wanted.row(sample).tolist() for sample in chosen]


def test_some_histories_did_not_fit(tokenizer):
    table, catalogue, encoder = world(2, tokenizer, 130)
    _, notes = tokenise_split(encoder, catalogue, CodedWindows.of(table, catalogue))
    assert len(notes) == 1 and "oldest history items are left out" in notes[0]


@pytest.mark.parametrize("mode", ["keep", "mask", "shuffle"])
def test_training_controls_change_the_same_histories(tokenizer, mode):
    table, catalogue, encoder = world(1, tokenizer)
    wanted, _ = reference_split(encoder, catalogue, control_history(table, mode, 7))
    windows = CodedWindows.of(table, catalogue).controlled(mode, 7)
    store, _ = tokenise_split(encoder, catalogue, windows)
    assert_same(store, wanted)
    assert common_head(store) == common_head(wanted)


def test_a_digest_in_many_parts_is_the_digest_of_the_whole(tokenizer, monkeypatch):
    table, catalogue, encoder = world(4, tokenizer)
    wanted, _ = reference_split(encoder, catalogue, table)
    monkeypatch.setattr("gdrt_ds.data.window_store.CHUNK_TOKENS", 300)
    monkeypatch.setattr("gdrt_ds.data.window_store.CHUNK", 7)
    store, _ = tokenise_split(encoder, catalogue, CodedWindows.of(table, catalogue))
    assert store.fingerprint == wanted.fingerprint


# -- facts of target tokens
def facts_of(seed: int):
    """(facts, their values as an array) of each kind, over samples whose targets are titles."""
    rng = np.random.default_rng(seed)
    num_tokens = rng.integers(1, 6, 12)
    offsets = np.concatenate([[0], np.cumsum(num_tokens)])
    entry_of = rng.integers(0, 11, 300).astype(np.int32)  # entry 11 is in no sample
    targets = num_tokens[entry_of].astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(targets)])
    store = TokenStore(np.zeros(0, np.int32), starts, np.zeros(0, np.int8), targets, starts)
    owner = np.repeat(np.arange(300), targets)
    place = np.arange(len(owner)) - starts[owner]
    scores = rng.normal(-3, 2, offsets[-1]).astype(np.float32).round(1)  # rounded: some are equal
    yield ByEntry(scores, store, offsets, entry_of), scores[offsets[entry_of[owner]] + place]
    case_of = rng.integers(0, 4, 300)
    yield BySample(np.array([5.0, 7.0, 1.0, 9.0]), store, case_of), np.array([5.0, 7, 1, 9])[case_of[owner]]
    steps = np.arange(5) / 3
    yield ByPlace(steps, store), steps[place]


@pytest.mark.parametrize("seed", range(20))
def test_facts_by_case_are_asked_and_counted_like_one_value_for_each_token(seed):
    for facts, wanted in facts_of(seed):
        assert len(facts) == len(wanted) and facts.dtype == wanted.dtype
        assert np.array_equal(facts.whole(), wanted)
        index = np.random.default_rng(seed).integers(0, len(wanted), 50)
        assert np.array_equal(facts[index], wanted[index])
        assert np.array_equal(facts[3:40], wanted[3:40])
        assert distinct(facts) == len(np.unique(wanted))
        groups = facts.map(lambda table: np.searchsorted([2.0, 6.0], table))
        assert np.array_equal(group_counts(groups, 4), np.bincount(groups.whole(), minlength=4))


@pytest.mark.parametrize("seed", range(20))
def test_quantiles_of_facts_are_equal_to_the_bit_to_those_of_the_whole_array(seed):
    shares = np.concatenate([np.arange(1, 8) / 8, [0.0, 0.001, 0.999, 1.0, 1 / 3]])
    for facts, wanted in facts_of(seed):
        assert quantiles(facts, shares).tolist() == np.quantile(wanted, shares).tolist()


@pytest.mark.parametrize("count", [1, 7, 1000, 100_003])
def test_the_order_of_an_epoch_is_numpy_s_permutation_in_half_the_memory(count):
    order = permutation(5, 3, count)
    wanted = np.random.Generator(np.random.PCG64([5, 3])).permutation(count)
    assert np.array_equal(order, wanted) and order.dtype == np.int32


def test_a_step_allocates_as_much_for_a_large_log_as_for_a_small_one(tokenizer):
    """Of the order of an epoch, which the steps share, only the batch is looked at."""
    sizes = [bytes_of_a_step(num, tokenizer) for num in (2_000, 400_000)]
    assert sizes[1] < 1.5 * sizes[0] < 10_000_000


def bytes_of_a_step(num_events: int, tokenizer) -> int:
    rng = np.random.default_rng(0)
    items = {f"i{k}": Item(f"i{k}", f"{WORDS[k % 11]} {WORDS[k // 11]}") for k in range(99)}
    users = rng.integers(0, num_events // 20, num_events).astype(np.int32)
    log = InteractionColumns(
        users,
        rng.integers(0, 99, num_events).astype(np.int32),
        rng.integers(0, 10**9, num_events).astype(np.float64),
        None,
        Names.of([f"u{k}" for k in range(num_events // 20)]),
        items,
    )
    windows, _ = make_windows(log, DataSection(path="log"))
    catalogue = Catalogue.build(Corpus("log", "item", windows.items, windows.splits))
    config = load_config(None, ["prompt.template=plain"])
    template = PromptTemplate.from_config(config.prompt, "item", tokenizer)
    encoder = PromptEncoder(template, tokenizer, 1024)
    coded = CodedWindows.of(windows.splits["train"], catalogue)
    store, _ = tokenise_split(encoder, catalogue, coded)
    lengths = [len(encoder.target_ids(entry.text)) for entry in catalogue.entries]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    groups = ByEntry(np.zeros(offsets[-1], np.int16), store, offsets, coded.targets)
    plan = BatchPlan(store.lengths, 32, 8, 2, 0)
    plan.step(0)
    tracemalloc.start()
    for slots in plan.step(1):
        micro = build_micro_batch(store, slots[0], "packed", 0, 0)
        assert len(groups[micro.token_index]) == len(micro.labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
