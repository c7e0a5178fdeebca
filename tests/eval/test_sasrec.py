"""SASRec, the floor that learns: its network against a reference, what it trains on, and its cache."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.floors import popularity
from eval.sasrec import (
    GRID,
    SASRec,
    Setting,
    Training,
    cached,
    fingerprint_of,
    load_or_train,
    sequences_of,
    tune,
)
from eval.sasrec import training as training_module
from eval.sasrec.cache import folder_of
from eval.sasrec.sequences import NO_TARGET, histories_of
from eval.sasrec.training import PATIENCE, log_probs, validate
from gdrt_ds.config import load_config
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import Corpus, Item, Sample, load_corpus

SMALL = (Setting(16, 0.0, 1e-2), Setting(16, 0.2, 1e-2))


def users_corpus(num_users: int = 12, num_items: int = 30, history: int = 4) -> Corpus:
    """Users with 9 items each, the last two left out. Valid and test targets occur nowhere else."""
    rng = np.random.default_rng(0)
    items = {str(i): Item(str(i), f"title {i}") for i in range(num_items + 2 * num_users)}
    splits: dict[str, list[Sample]] = {"train": [], "valid": [], "test": []}
    for user in range(num_users):
        own = [str(i) for i in rng.choice(num_items, size=7, replace=False)]
        own += [str(num_items + user), str(num_items + num_users + user)]
        for place in range(1, 9):
            split = {7: "valid", 8: "test"}.get(place, "train")
            past = tuple(own[max(0, place - history) : place])
            number = len(splits[split])
            splits[split].append(Sample(number, f"u{user}", past, own[place], float(place)))
    return Corpus("users", "item", items, splits)


def planted(**options) -> Corpus:
    return load_corpus(load_config(None, ["data.path=planted", f"data.planted={json.dumps(options)}"]).data)


def sequences(corpus: Corpus):
    return sequences_of(corpus, Catalogue.build(corpus))


def random_model(num_items=11, max_history=5, hidden=8, dropout=0.0) -> SASRec:
    torch.manual_seed(0)
    model = SASRec(num_items, max_history, hidden, dropout)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def reference_log_probs(model: SASRec, ids: list[int]) -> np.ndarray:
    """ln p(entry) behind the last of `ids`, by plain float64 matrices, one slot after the other; [I]."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return weights[f"{name}weight"] @ x + weights[f"{name}bias"]

    states = [weights["items.weight"][i] + weights["slots.weight"][t] for t, i in enumerate(ids)]
    size = len(states[0])
    for layer in ("layers.layers.0", "layers.layers.1"):
        triples = [
            np.split(linear(norm(x, f"{layer}.norm1"), f"{layer}.self_attn.in_proj_"), 3) for x in states
        ]
        found = []
        for t, x in enumerate(states):
            heads = []
            for head in np.split(np.arange(size), 2):
                scores = np.array([triples[t][0][head] @ triples[s][1][head] for s in range(t + 1)])
                share = np.exp(scores / np.sqrt(len(head)))
                share /= share.sum()
                heads.append(sum(p * triples[s][2][head] for s, p in enumerate(share)))
            x = x + linear(np.concatenate(heads), f"{layer}.self_attn.out_proj.")
            inner = torch.from_numpy(linear(norm(x, f"{layer}.norm2"), f"{layer}.linear1."))
            inner = torch.nn.functional.gelu(inner).numpy()
            found.append(x + linear(inner, f"{layer}.linear2."))
        states = found
    logits = weights["items.weight"][:-1] @ norm(states[-1], "layers.norm") + weights["bias"]
    return logits - np.log(np.exp(logits).sum())


def test_probabilities_equal_a_plain_reference_for_histories_of_every_length():
    model = random_model().eval()
    histories = [[], [3], [3, 7], [1, 2, 3, 4, 5], [9, 8, 1, 2, 3, 4, 5]]
    found = log_probs(model, histories_of(histories, 5, 11))
    assert np.allclose(np.exp(found).sum(axis=1), 1.0, atol=1e-12)
    for history, row in zip(histories, found, strict=True):
        assert np.allclose(row, reference_log_probs(model, [11, *history[-5:]]), atol=1e-5)


def test_the_loss_is_a_softmax_over_every_entry_averaged_over_the_targets():
    model = random_model()
    ids = torch.tensor([[11, 3, 7, 11], [11, 1, 2, 9]])
    targets = torch.tensor([[NO_TARGET, 7, 2, NO_TARGET], [1, NO_TARGET, NO_TARGET, 4]])
    wanted = [([11, 3], 7), ([11, 3, 7], 2), ([11], 1), ([11, 1, 2, 9], 4)]
    expected = -np.mean([reference_log_probs(model, history)[target] for history, target in wanted])
    assert float(model.loss(ids, targets).detach()) == pytest.approx(expected, abs=1e-5)


def test_a_score_does_not_depend_on_later_items():
    model = random_model(dropout=0.0)
    ids = torch.tensor([[11, 3, 7, 2, 9, 1]])
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            before = model.states(ids)
            for slot in range(1, 6):
                changed = ids.clone()
                changed[0, slot:] = torch.tensor([5, 0, 6, 10, 4])[: 6 - slot]
                after = model.states(changed)
                assert torch.allclose(after[0, :slot], before[0, :slot], atol=1e-6)
                assert not torch.allclose(after[0, slot], before[0, slot], atol=1e-2)


def test_every_train_window_is_a_target_once_per_epoch_with_its_own_items_before_it():
    corpus = users_corpus()
    index = Catalogue.build(corpus).index_of
    found = sequences(corpus)
    windows = corpus.splits["train"]
    past = {(s.user_id, index[s.target]): [index[i] for i in s.history] for s in windows}
    for epoch in (1, 2, 3):
        ids, targets = found.segments([0, epoch])
        seen = []
        for row, wanted in zip(ids, targets, strict=True):
            for slot in np.flatnonzero(wanted != NO_TARGET):
                own = [key for key in past if key[1] == wanted[slot] and past[key][-1] == row[slot]]
                history = row[1 : slot + 1].tolist()
                assert history and any(past[key][-len(history) :] == history for key in own)
                seen.append(int(wanted[slot]))
        assert Counter(seen) == Counter(index[s.target] for s in windows)
    assert not np.array_equal(found.segments([0, 1])[1], found.segments([0, 2])[1])


def test_no_valid_or_test_target_is_trained_on_or_read_in_training():
    corpus = users_corpus()
    index = Catalogue.build(corpus).index_of
    held_out = {index[s.target] for split in ("valid", "test") for s in corpus.splits[split]}
    for epoch in range(3):
        ids, targets = sequences(corpus).segments([0, epoch])
        assert not held_out & set(targets.ravel().tolist()) and not held_out & set(ids.ravel().tolist())
    assert {index[s.target] for s in corpus.splits["valid"]} == set(sequences(corpus).valid_targets.tolist())


def test_windows_that_do_not_overlap_are_sequences_of_their_own():
    corpus = planted(num_items=24, num_train=60, num_valid=10, num_test=10)
    found = sequences(corpus)
    ids, targets = found.segments([0, 1])
    assert len(ids) == 60 and ((targets != NO_TARGET).sum(axis=1) == 1).all()
    assert sorted((ids != 24).sum(axis=1)) == sorted(len(s.history) for s in corpus.splits["train"])


def test_equal_scores_share_their_places_in_validation_and_know_nothing():
    found = sequences(users_corpus())
    model = SASRec(found.num_items, found.max_history, 8, 0.0)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    ndcg, nll = validate(model, found)
    assert ndcg == pytest.approx((1 / np.log2(np.arange(2, 12))).sum() / found.num_items)
    assert nll == pytest.approx(np.log(found.num_items))


def test_a_model_before_its_first_step_scores_like_popularity_among_the_targets():
    found = sequences(users_corpus())
    model = training_module.new_model(found, Setting(8, 0.0, 1e-3))
    counts = np.bincount(found.targets(), minlength=found.num_items) + 1
    scores = log_probs(model, found.valid)
    assert np.abs(scores - np.log(counts / counts.sum())).max() < 0.5


def test_early_stopping_keeps_the_weights_of_the_epoch_that_was_best_on_valid():
    training = Training(sequences(users_corpus()), Setting(16, 0.0, 3e-2))
    while not training.ended:
        training.run_epoch()
    nll = [epoch.nll for epoch in training.epochs]
    assert training.best == int(np.argmin(nll)) and len(nll) == training.best + 1 + PATIENCE
    assert nll[-1] > min(nll)
    training.model.load_state_dict(training.best_weights)
    assert validate(training.model, training.sequences)[1] == pytest.approx(min(nll), abs=1e-9)


def test_the_setting_that_is_best_on_valid_is_taken_and_training_repeats_bitwise():
    found = sequences(planted(num_items=12, num_train=300, num_valid=60, num_test=10))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    tuned = [tune(found, (*SMALL, Setting(16, 0.0, 1e-7)), seed=3) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)  # the model that is evaluated draws what it would have
    lowest = {setting: min(epoch.nll for epoch in epochs) for setting, epochs in tuned[0].tried.items()}
    assert tuned[0].valid.nll == lowest[tuned[0].setting] == min(lowest.values())
    assert tuned[0].setting == tuned[1].setting and tuned[0].tried == tuned[1].tried
    for name, value in tuned[0].weights.items():
        assert torch.equal(value, tuned[1].weights[name])


def test_it_beats_popularity_where_the_target_hangs_on_the_history():
    corpus = planted(num_items=24, num_train=1500, num_valid=150, num_test=300)
    catalogue = Catalogue.build(corpus)
    tuned = tune(sequences_of(corpus, catalogue), (Setting(32, 0.1, 1e-2),))
    model = SASRec(len(catalogue), sequences(corpus).max_history, 32, 0.1)
    model.load_state_dict(tuned.weights)
    index = catalogue.index_of
    for kind, gain in (("history", 1.0), ("shortcut", -0.1)):
        samples = [s for s in corpus.splits["test"] if s.labels["kind"] == kind]
        histories = histories_of([[index[i] for i in s.history] for s in samples], 4, len(catalogue))
        targets = [index[s.target] for s in samples]
        own = log_probs(model, histories)[np.arange(len(samples)), targets].mean()
        popular = np.log(popularity.popularity(catalogue))[targets].mean()
        assert own > popular + gain, kind


def test_it_is_trained_once_per_data_set_and_again_when_train_or_valid_change(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GDRT_CACHE", str(tmp_path))
    corpus = users_corpus()
    found = sequences(corpus)
    first = load_or_train(found, SMALL)
    weights = folder_of(fingerprint_of(found, SMALL)) / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = load_or_train(sequences(users_corpus()), SMALL)
    assert weights.stat().st_mtime_ns == written and again.about == first.about
    assert np.array_equal(log_probs(again.model, found.valid), log_probs(first.model, found.valid))
    assert validate(again.model, found)[1] == pytest.approx(first.about["valid"]["nll"], abs=1e-9)

    def with_another_target(split: str) -> str:
        changed = users_corpus()
        changed.splits[split][3] = replace(changed.splits[split][3], target="29")
        return fingerprint_of(sequences(changed), SMALL)

    known = fingerprint_of(found, SMALL)
    assert with_another_target("train") != known != with_another_target("valid")
    assert with_another_target("test") == known  # nothing that is trained looks at it
    assert fingerprint_of(found, SMALL[:1]) != known != fingerprint_of(found, SMALL, seed=1)

    weights.write_bytes(weights.read_bytes()[:100])
    assert cached(found, known) is None and "it is trained again" in capsys.readouterr().out
    repaired = load_or_train(found, SMALL)
    assert np.array_equal(log_probs(repaired.model, found.valid), log_probs(first.model, found.valid))


def test_the_grid_covers_sizes_dropouts_and_learning_rates():
    assert all(len({getattr(s, name) for s in GRID}) > 1 for name in ("hidden", "dropout", "learning_rate"))
