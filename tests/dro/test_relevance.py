"""Relevance without a model.

Counting train targets gives the best history-free predictor, smoothed, for every title token.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gdrt_ds.batches import build_micro_batch
from gdrt_ds.batches.tree_attention import TreeLayout
from gdrt_ds.config import load_config
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.dro import relevance
from gdrt_ds.errors import UserError

TITLES = [[5, 7, 2], [5, 8, 2], [6, 9, 9, 2], [4, 2]]  # token sequences, 2 ends a title
HEAD = [1, 3]


def store_of(titles):
    rows = [HEAD + t for t in titles]
    num_target = np.array([len(t) for t in titles], dtype=np.int32)
    return TokenStore(
        np.concatenate(rows).astype(np.int32),
        np.cumsum([0, *map(len, rows)]).astype(np.int64),
        np.zeros(sum(map(len, rows)), np.int8),
        num_target,
        np.cumsum([0, *num_target]).astype(np.int64),
    )


def test_corpus_scores_are_smoothed_frequencies_of_the_next_title_token():
    r = relevance.corpus_scores(store_of(TITLES), np.array([6, 2, 1, 0]))
    first = {5: np.log(9 / 12), 6: np.log(2 / 12), 4: np.log(1 / 12)}  # 9 targets, 3 first tokens
    second = {7: np.log(7 / 10), 8: np.log(3 / 10)}  # 8 of them begin with 5
    expected = [first[5], second[7], 0, first[5], second[8], 0, first[6], 0, 0, 0, first[4], 0]
    assert r.dtype == np.float32 and np.allclose(r, expected, atol=1e-6)


def test_corpus_scores_sum_to_one_over_the_catalogue():
    counts = np.array([3, 0, 5, 1])
    r, offsets = relevance.corpus_scores(store_of(TITLES), counts), store_of(TITLES).target_offsets
    assert sum(np.exp(r[a:b].sum()) for a, b in zip(offsets, offsets[1:])) == pytest.approx(1, abs=1e-6)


def test_entries_that_training_does_not_know_change_nothing_for_the_others():
    """Two titles that only test has: one goes on differently behind a known prefix, one has a new prefix."""
    known = TITLES[:3]
    counts = np.array([6, 2, 1])
    alone = relevance.corpus_scores(store_of(known), counts)
    more = store_of([*known, [5, 9, 2], [9, 8, 2]])
    is_known = np.array([True, True, True, False, False])
    r = relevance.corpus_scores(more, np.array([6, 2, 1, 0, 0]), is_known)
    assert np.array_equal(r[: len(alone)], alone)
    # 8 train targets begin with 5 and go on in two ways; 9 targets have two first tokens.
    assert np.allclose(r[len(alone) :], [np.log(9 / 11), np.log(1 / 10), 0, np.log(1 / 11), 0, 0])


def test_no_history_free_predictor_has_a_lower_train_loss_than_counting():
    """Random predictors over the same trie, and the counts of other data, all lose against the train counts
    (many samples: smoothing vanishes).
    """
    counts, store = np.array([600, 200, 150, 50]), store_of(TITLES)
    weight = np.repeat(counts, store.num_target)
    best = -(weight * relevance.corpus_scores(store, counts)).sum()
    rng = np.random.default_rng(0)
    assert all(
        best < -(weight * relevance.corpus_scores(store, rng.integers(1, 1000, 4))).sum() for _ in range(50)
    )


def test_the_corpus_reference_is_a_setting_and_needs_no_adapter():
    config = load_config(None, ["groups.reference=corpus"])
    assert config.groups.reference == "corpus" and config.groups.reference_adapter is None


def test_entry_scores_are_read_at_the_token_before_however_titles_are_dealt_out():
    """A stand-in for the model whose loss names the label, the token it is predicted from, and that token's
    place.
    """
    store = store_of(TITLES)

    def losses(m):
        return (
            m.labels
            + 100 * m.inputs["input_ids"].flatten()[m.supervised]
            + 10_000 * m.inputs["position_ids"].flatten()[m.supervised]
        ).float()

    runtime = SimpleNamespace(world=1, rank=0, device="cpu")
    expected = [
        -(label + 100 * before + 10_000 * (len(HEAD) - 1 + i))
        for t in TITLES
        for i, (before, label) in enumerate(zip([HEAD[-1], *t], t))
    ]
    for packing in ("none", "packed", "shared_prefix"):
        for tokens in (4, 100):
            assert np.allclose(
                relevance.score_entries(
                    store, losses, runtime, packing=packing, pad_id=0, tokens_per_batch=tokens
                ),
                expected,
            )


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("packed", TreeLayout.build([4, 4, 5, 3])),
        ("shared_prefix", TreeLayout.build([3, 3, 4, 2], 1)),
        ("prefix_tree", TreeLayout.build([3, 3, 4, 2], 1)),
    ],
)
def test_entries_share_their_prompt_unless_rows_are_packed_for_an_attention_that_cannot(packing, layout):
    """The variable-length call of flash-attn takes rows in which nothing is shared."""
    seen = []

    def losses(micro):
        seen.append(micro.inputs["tree_layout"].chains)
        return torch.zeros(len(micro.labels))

    runtime = SimpleNamespace(world=1, rank=0, device="cpu")
    relevance.score_entries(store_of(TITLES), losses, runtime, packing=packing, pad_id=0)
    assert seen == [layout.chains]


def test_a_shared_head_must_leave_each_sample_the_position_before_its_target():
    with pytest.raises(UserError, match="predicts a target token"):
        build_micro_batch(store_of(TITLES), np.arange(2), "shared_prefix", len(HEAD), 0)


@pytest.mark.parametrize("torn", [b"", b"half of a header", None])
def test_a_cached_table_that_cannot_be_read_is_scored_again(tmp_path, torn):
    key = "0123456789abcdef" * 2
    relevance.save_cached(tmp_path, key, np.arange(3, dtype=np.float32))
    assert relevance.load_cached(tmp_path, key, 3).tolist() == [0, 1, 2]
    assert relevance.load_cached(tmp_path, key, 4) is None, "of other data"
    (file,) = tmp_path.iterdir()
    file.unlink()
    if torn is not None:
        file.write_bytes(torn)
    assert relevance.load_cached(tmp_path, key, 3) is None
