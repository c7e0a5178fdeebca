"""Catalogue: equal titles are one entry; trie.

What depth-first intervals promise, on random sequences and at scale.
"""

import json
import random
import time

import numpy as np
import pytest

from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import Corpus, Item, Sample
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.errors import UserError


def corpus_of(titles, windows=()):
    items = {
        str(i): Item(str(i), title, provider=provider, genres=genres)
        for i, (title, provider, genres) in enumerate(titles)
    }
    train = [
        Sample(i, user, tuple(map(str, ids[:-1])), str(ids[-1]), float(i))
        for i, (user, ids) in enumerate(windows)
    ]
    return Corpus("toy", "item", items, {"train": train, "valid": [], "test": []})


def random_sequences(seed, count=200, vocabulary=4, end=9):
    """Distinct sequences that end with a terminator that is nowhere else."""
    rng = random.Random(seed)
    found = {
        tuple(rng.randrange(vocabulary) for _ in range(rng.randrange(1, 9))) + (end,) for _ in range(count)
    }
    sequences = [list(s) for s in found]
    rng.shuffle(sequences)
    return sequences


def test_equal_titles_are_one_entry_with_all_ids_counts_and_labels():
    titles = [
        ("Tom &amp; Co", None, ("a",)),
        ("Other", "Q", ()),
        (" Tom &  Co ", "P", ("b", "a")),
        ("tom & co", None, ()),
    ]
    catalogue = Catalogue.build(corpus_of(titles, [("u", (0, 1, 2)), ("v", (2, 3))]))
    assert [entry.text for entry in catalogue.entries] == [
        "Tom & Co",
        "Other",
        "tom & co",
    ]  # case differs: another title
    first = catalogue.entries[0]
    assert (first.item_id, first.merged_ids, first.train_count, first.provider) == ("0", ["0", "2"], 3, "P")
    assert first.groups == {"genres": ["a", "b"]}
    assert (
        catalogue.index_of == {"0": 0, "2": 0, "1": 1, "3": 2}
        and catalogue.text_of("2") == "Tom & Co"
        and len(catalogue) == 3
    )
    assert catalogue.notes() == [
        "1 of 4 items share their title with another and are merged: 3 catalogue entries"
    ]


def test_saved_catalogue_is_one_plain_object_per_entry_and_loads_again(tmp_path):
    catalogue = Catalogue.build(corpus_of([("Café <b>", "P", ("g",)), ("B", None, ())], [("u", (0, 1))]))
    catalogue.save(tmp_path / "catalogue.jsonl")
    lines = [
        json.loads(line) for line in (tmp_path / "catalogue.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert lines[0] == {
        "item_id": "0",
        "merged_ids": ["0"],
        "text": "Café <b>",
        "train_count": 1,
        "provider": "P",
        "groups": {"genres": ["g"]},
    }
    loaded = Catalogue.load(tmp_path / "catalogue.jsonl")
    assert loaded.entries == catalogue.entries and loaded.index_of == catalogue.index_of
    with pytest.raises(UserError, match="cannot be read"):
        Catalogue.load(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"item_id": 1}\n')
    with pytest.raises(UserError, match="bad.jsonl, line 1: not a catalogue entry"):
        Catalogue.load(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("seed", range(5))
def test_trie_paths_spell_the_sequences_and_intervals_are_the_subtrees(seed):
    sequences = random_sequences(seed)
    trie = TokenTrie.build(sequences)
    prefixes = {tuple(s[:k]) for s in sequences for k in range(len(s) + 1)}
    assert trie.num_nodes == len(prefixes) == len(trie.token)
    leaves = np.flatnonzero(trie.entry >= 0)
    assert sorted(trie.entry[leaves].tolist()) == list(range(len(sequences)))
    spelled = {}
    for node in range(trie.num_nodes):
        path, at = [], node
        while at > 0:
            path.append(int(trie.token[at]))
            at = int(trie.parent[at])
        spelled[node] = tuple(reversed(path))
        assert len(path) == trie.depth[node]
    assert set(spelled.values()) == prefixes
    assert all(list(spelled[leaf]) == sequences[trie.entry[leaf]] for leaf in leaves.tolist())
    for a in range(0, trie.num_nodes, 7):
        below = {m for m in range(trie.num_nodes) if spelled[m][: len(spelled[a])] == spelled[a]}
        assert below == set(range(a, trie.end[a]))


@pytest.mark.parametrize("seed", range(3))
def test_children_ascend_and_walk_gives_the_node_before_each_token(seed):
    sequences = random_sequences(seed)
    trie = TokenTrie.build(sequences)
    for node in range(trie.num_nodes):
        children = trie.children(node)
        assert (trie.parent[children] == node).all() and (np.diff(trie.token[children]) > 0).all()
        assert trie.branching[node] == (len(children) > 1) and (trie.entry[node] >= 0) == (len(children) == 0)
    for index, sequence in enumerate(sequences):
        nodes = trie.walk(sequence)
        assert nodes[0] == 0 and len(nodes) == len(sequence)
        assert all(trie.parent[b] == a for a, b in zip(nodes, nodes[1:]))
        leaf = [c for c in trie.children(nodes[-1]) if trie.token[c] == sequence[-1]]
        assert trie.entry[leaf[0]] == index
    with pytest.raises(KeyError, match="token 77 at position 0 leaves"):
        trie.walk([77])


def test_titles_that_cannot_be_told_apart_are_refused_by_name():
    with pytest.raises(UserError, match="'Toy' and 'Toy 2' are one a prefix of the other"):
        TokenTrie.build([[5, 9], [1, 2], [1, 2, 3]], ["Else", "Toy", "Toy 2"])
    with pytest.raises(UserError, match="'A' and 'B' are the same tokens"):
        TokenTrie.build([[1, 2], [3], [1, 2]], ["A", "C", "B"])
    with pytest.raises(UserError, match="'' has no tokens"):
        TokenTrie.build([[1], []], ["A", ""])
    with pytest.raises(UserError, match="catalogue is empty"):
        TokenTrie.build([])


def test_one_title_is_a_chain_without_branching():
    trie = TokenTrie.build([[4, 2, 9]])
    assert (
        trie.end.tolist() == [4, 4, 4, 4]
        and trie.parent.tolist() == [-1, 0, 1, 2]
        and not trie.branching.any()
    )
    assert trie.entry.tolist() == [-1, -1, -1, 0]


def test_a_hundred_thousand_titles_build_in_seconds():
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 22, size=100_000)
    sequences = [
        [*rng.integers(0, 300, size=2).tolist(), index, *rng.integers(0, 30000, size=n).tolist(), 1]
        for index, n in enumerate(lengths)
    ]
    start = time.process_time()
    trie = TokenTrie.build(sequences)
    assert time.process_time() - start < 8  # about 1.5 s on an idle core
    assert trie.num_nodes > 1_400_000 and trie.end[0] == trie.num_nodes
