"""The planted-shortcut corpus is what it says.

Shares, the successor rule, labels that can be trusted, seeds.
"""

from collections import Counter

import pytest

from gdrt_ds.config import DataSection
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import load_corpus
from gdrt_ds.errors import UserError


def planted(sample_seed=0, **options):
    return load_corpus(
        DataSection(
            path="planted",
            sample_seed=sample_seed,
            planted={"num_train": 1000, "num_test": 200, "num_valid": 50, **options},
        )
    )


def by_kind(corpus, kind, split="train"):
    return [s for s in corpus.split(split) if s.labels["kind"] == kind]


def test_history_targets_follow_the_successor_rule_and_never_hit_a_shortcut_item():
    corpus = planted(num_items=20)
    popular = {s.target for s in by_kind(corpus, "shortcut")}
    dependent = by_kind(corpus, "history")
    assert len(dependent) == 200 and len(by_kind(corpus, "shortcut")) == 800
    assert all(int(s.target) == int(s.history[-1]) % 20 + 1 for s in dependent)
    assert len(popular) == 4 and not popular & {s.target for s in dependent}
    assert len({s.target for s in dependent}) == 16


def test_shortcut_targets_do_not_depend_on_the_history():
    corpus = planted(num_train=8000)
    share = Counter(s.target for s in by_kind(corpus, "shortcut"))
    weights = sorted((count / 6400 for count in share.values()), reverse=True)
    expected = [0.7**k / sum(0.7**j for j in range(4)) for k in range(4)]
    assert weights == pytest.approx(expected, abs=0.025)
    top = share.most_common(1)[0][0]
    by_last = {}
    for s in by_kind(corpus, "shortcut"):
        by_last.setdefault(s.history[-1], []).append(s.target == top)
    assert all(
        abs(sum(hits) / len(hits) - expected[0]) < 0.12 for hits in by_last.values()
    )  # 320 per last item: 4.4 standard errors


def test_both_kinds_end_in_the_same_last_items():
    corpus = planted(num_train=4000)
    assert {s.history[-1] for s in by_kind(corpus, "shortcut")} == {
        s.history[-1] for s in by_kind(corpus, "history")
    }
    for split in ("train", "valid", "test"):
        for s in corpus.split(split):
            assert len(set(s.history)) == len(s.history) and 2 <= len(s.history) <= 4


def test_titles_are_two_words_and_the_first_identifies_the_item():
    corpus = planted(num_items=60)
    titles = [item.title.split() for item in corpus.items.values()]
    assert all(len(words) == 2 for words in titles) and len({words[0] for words in titles}) == 60
    assert len(Catalogue.build(corpus)) == 60
    assert all(item.provider and item.genres for item in corpus.items.values())
    assert {a["cohort"] for a in corpus.users.values()} == {"a", "b"}


def test_the_same_seed_gives_the_same_corpus():
    assert planted(3).fingerprint == planted(3).fingerprint != planted(4).fingerprint
    assert planted(0, seed=3).fingerprint == planted(9, seed=3).fingerprint


def test_shares_at_the_ends():
    assert not by_kind(planted(shortcut_share=0), "shortcut") and not by_kind(
        planted(shortcut_share=1.0), "history"
    )


@pytest.mark.parametrize(
    "options, message, hint",
    [
        ({"num_item": 9}, "data.planted.num_item: unknown option", "`num_items`"),
        ({"num_items": 2.5}, "data.planted.num_items=2.5: expected a whole number", "24"),
        ({"num_items": True}, "data.planted.num_items=True", "24"),
        ({"shortcut_share": "most"}, "data.planted.shortcut_share='most': expected a number", "0.8"),
        ({"shortcut_share": 1.5}, "data.planted.shortcut_share=1.5: out of range", "shortcut_share <= 1"),
        ({"num_popular": 13}, "data.planted.num_popular=13: out of range", "num_items / 2"),
        ({"min_history": 5}, "data.planted.max_history=4: out of range", "min_history <= max_history"),
        ({"num_test": 0}, "data.planted.num_test=0", "positive"),
    ],
)
def test_wrong_options_are_named(options, message, hint):
    with pytest.raises(UserError, match=message) as caught:
        planted(**options)
    assert hint in caught.value.fix
