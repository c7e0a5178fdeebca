"""Metrics against scikit-learn, RecBole, fairlearn and hand-computed cases; planted errors must fail."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import math
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from examples import entry, prediction, world

from eval.metrics import (
    accuracy,
    evaluate,
    evaluate_targets,
    inputs,
    item_side,
    provider_side,
    slices,
    table,
    user_side,
)

FAST = {"num_bootstrap": 20, "breakdowns": False}


def value(found: dict, name: str) -> float:
    return found["metrics"][name]["value"]


def recbole(class_name: str, method: str):
    """A method of RecBole's metrics, compiled from its installed file.

    Importing the package would need all its dependencies.
    """
    try:
        path = importlib.metadata.distribution("recbole").locate_file("recbole/evaluator/metrics.py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(
            "recbole is not installed, so its metrics cannot be compared with; "
            "`make install` brings it (pip install --no-deps recbole==1.2.1)"
        )
    tree = ast.parse(Path(str(path)).read_text())
    owner = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    function = next(n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == method)
    space = {"np": np, "Counter": Counter}
    exec(compile(ast.Module([function], []), str(path), "exec"), space)
    return lambda *arguments: space[method](None, *arguments)


# --- accuracy


def test_ndcg_and_hit_rate_agree_with_scikit_learn():
    sklearn_metrics = pytest.importorskip(
        "sklearn.metrics", reason="scikit-learn is not installed, so NDCG cannot be compared with it"
    )
    predictions, entries, scores = world()
    found = evaluate(predictions, entries, **FAST)
    truth = np.array([[int(p["target_id"] == e.item_id) for e in entries] for p in predictions])
    for k in (1, 5, 10, 20, 50):
        assert value(found, f"ndcg@{k}") == pytest.approx(
            sklearn_metrics.ndcg_score(truth, scores, k=k), abs=1e-12
        )
        top_k = sklearn_metrics.top_k_accuracy_score(
            truth.argmax(1), scores, k=k, labels=np.arange(len(entries))
        )
        assert value(found, f"hr@{k}") == pytest.approx(top_k, abs=1e-12)


def test_tied_scores_count_as_their_expectation_as_in_scikit_learn():
    sklearn_metrics = pytest.importorskip(
        "sklearn.metrics", reason="scikit-learn is not installed, so NDCG cannot be compared with it"
    )
    predictions, entries, scores = world()
    scores = np.round(scores)  # many ties
    for p, row in zip(predictions, scores):
        mine = row[int(p["target_id"][1:])]
        p["num_tied"] = int(np.sum(row == mine))
        p["rank"] = float(np.sum(row > mine)) + (p["num_tied"] + 1) / 2
    truth = np.array([[int(p["target_id"] == e.item_id) for e in entries] for p in predictions])
    found = evaluate(predictions, entries, **FAST)
    for k in (5, 10):
        assert value(found, f"ndcg@{k}") == pytest.approx(
            sklearn_metrics.ndcg_score(truth, scores, k=k), abs=1e-12
        )


def test_a_constant_scorer_scores_exactly_like_chance():
    entries = [entry(f"i{i}") for i in range(60)]
    predictions = [prediction(n, f"i{n}", 30.5, [f"i{i}" for i in range(10)], num_tied=60) for n in range(60)]
    found = evaluate(predictions, entries, **FAST)
    assert value(found, "hr@10") == pytest.approx(10 / 60)
    assert value(found, "ndcg@10") == pytest.approx(sum(1 / math.log2(r + 1) for r in range(1, 11)) / 60)
    assert value(found, "mrr") == pytest.approx(sum(1 / r for r in range(1, 61)) / 60)
    assert value(found, "mean_rank_share") == pytest.approx(0.5)


def test_hand_computed_accuracy_and_a_missing_rank_is_a_miss():
    entries = [entry(f"i{i}") for i in range(20)]
    listed = [f"i{i}" for i in range(10, 17)]
    predictions = [
        prediction(0, "i0", 1, ["i0"]),
        prediction(1, "i1", 3, listed),
        prediction(2, "i2", None, listed),
        prediction(3, "i3", math.nan, listed),
    ]
    predictions[3]["target_nll"] = None
    found = evaluate(predictions, entries, **FAST)
    assert value(found, "ndcg@5") == pytest.approx((1 + 0.5) / 4)
    assert value(found, "hr@1") == pytest.approx(0.25)
    assert found["metrics"]["nll"]["n"] == 3
    assert any("2 of 4 targets have no rank" in note for note in found["notes"])
    # Nothing is known behind the lists of seven.
    for name in ("mrr", "mean_rank_share", "cvar_rank_share", "hr@10", "ndcg@10", "reo@10"):
        assert name not in found["metrics"]
        assert any(
            note.startswith(f"{name}: not measured, the lists hold 7 items") for note in found["notes"]
        )
    assert set(slices.measures(inputs.build_inputs(predictions, entries))) == {"nll"}
    ranked = [{**p, "rank": rank} for p, rank in zip(predictions, (1, 3, 20, 20), strict=True)]
    assert value(evaluate(ranked, entries, **FAST), "mrr") == pytest.approx((1 + 1 / 3 + 2 / 20) / 4)


# --- item side


def test_coverage_gini_entropy_and_popularity_agree_with_recbole():
    predictions, entries, _ = world()
    found = evaluate(predictions, entries, **FAST)
    lists = np.array([[int(i[1:]) for i in p["top_ids"]] for p in predictions])
    counts = {i: e.train_count for i, e in enumerate(entries)}
    for k in (5, 10, 20):
        top = lists[:, :k]
        assert value(found, f"coverage@{k}") == pytest.approx(
            recbole("ItemCoverage", "get_coverage")(top, len(entries))
        )
        assert value(found, f"gini@{k}") == pytest.approx(recbole("GiniIndex", "get_gini")(top, len(entries)))
        per_item = recbole("ShannonEntropy", "get_entropy")(
            top
        )  # RecBole divides the entropy by the number of distinct items
        assert value(found, f"entropy@{k}") == pytest.approx(per_item * len(np.unique(top)))
        popularity = recbole("AveragePopularity", "metric_info")(
            recbole("AveragePopularity", "get_pop")(top, counts).astype(float)
        )
        assert value(found, f"arp@{k}") == pytest.approx(popularity[:, -1].mean())


def popular_and_rare() -> tuple[list, list]:
    """Eight items, one per popularity bin, counts 80, 70, .. 10; two lists of five."""
    entries = [entry(f"i{i}", 80 - 10 * i) for i in range(8)]
    predictions = [
        prediction(0, "i0", 1, ["i0", "i1", "i2", "i3", "i4"], history_ids=["i0", "i1"]),
        prediction(1, "i7", 8, ["i0", "i1", "i2", "i3", "i5"], history_ids=["i7"]),
    ]
    return predictions, entries


def test_mgu_and_dgu_equal_the_hand_computed_case():
    predictions, entries = popular_and_rare()
    shown, history = np.array([2, 2, 2, 2, 1, 1, 0, 0]) / 10, np.arange(80, 0, -10) / 360
    found = evaluate(predictions, entries, ks=(5,), **FAST)
    assert value(found, "mgu@5") == pytest.approx(np.abs(shown - history).mean())
    assert value(found, "dgu@5") == pytest.approx((shown - history).max() - (shown - history).min())
    own = np.array([1, 1, 0, 0, 0, 0, 0, 1]) / 3
    assert value(found, "mgu_test_histories@5") == pytest.approx(np.abs(shown - own).mean())
    given = evaluate(predictions, entries, ks=(5,), history_item_counts={"i0": 3, "i7": 1}, **FAST)
    assert value(given, "mgu@5") == pytest.approx(
        np.abs(shown - np.array([0.75, 0, 0, 0, 0, 0, 0, 0.25])).mean()
    )


def test_the_convention_of_flower_orders_the_bins_by_occurrences_in_train_histories():
    entries = [entry(f"i{i}", 160 - 10 * i) for i in range(16)]
    # i0 stands in 16 histories, i15 in 15, i1 in 14, i14 in 13 and so on: a bin is one item from either end.
    counts = {f"i{i}": 16 - 2 * i for i in range(8)} | {f"i{15 - i}": 15 - 2 * i for i in range(8)}
    top = ["i0", "i1", "i2", "i3", "i4"]
    predictions = [prediction(0, "i0", 1, top), prediction(1, "i7", 8, top)]
    found = evaluate(predictions, entries, ks=(5,), history_item_counts=counts, **FAST)
    # Histories: 31, 27, 23, 19, 15, 11, 7, 3 of 136. Lists: a fifth in each of the first five bins.
    # Differences: -.0279, .0015, .0309, .0603, .0897, -.0809, -.0515, -.0221.
    assert value(found, "mgu_flower@5") == pytest.approx(0.0455882, abs=1e-7)
    assert value(found, "dgu_flower@5") == pytest.approx(0.0897059 + 0.0808824, abs=1e-7)
    # By train counts a bin is two neighbours. Lists: .4, .4, .2. Histories: 30, 26, 22, 18, 16, 12, 8, 4 less
    # or more: (i0, i1) 30, (i2, i3) 22, (i4, i5) 14, (i6, i7) 6, (i8, i9) 4, then 12, 20 and 28 of 136.
    ours = np.array([2, 2, 1, 0, 0, 0, 0, 0]) / 5 - np.array([30, 22, 14, 6, 4, 12, 20, 28]) / 136
    assert value(found, "mgu@5") == pytest.approx(np.abs(ours).mean())
    assert value(found, "dgu@5") == pytest.approx(ours.max() - ours.min())


def test_popularity_bins_hold_equal_numbers_of_seen_items_and_unseen_items_join_the_last():
    counts = np.array([0, 5, 9, 1, 7, 3, 0, 8, 2, 6])
    names = [f"i{n}" for n in range(10)]
    bins = np.asarray(inputs.popularity_bins(counts, names, 4).membership.argmax(axis=1)).ravel()
    assert [sorted(counts[bins == b].tolist(), reverse=True) for b in range(4)] == [
        [9, 8],
        [7, 6],
        [5, 3],
        [2, 1, 0, 0],
    ]


def test_a_genre_share_is_split_over_the_genres_of_an_item():
    entries = [entry("i0", 1, genres=("A", "B")), entry("i1", 1, genres=("A",))]
    found = evaluate([prediction(0, "i0", 1, ["i0"])], entries, ks=(1, 5), **FAST)
    grouping = inputs.build_inputs([prediction(0, "i0", 1, ["i0"])], entries).labelling("genres")
    assert grouping.membership.toarray().tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert (
        any("K is larger than the catalogue (2)" in note for note in found["notes"])
        and "mgu@5" not in found["metrics"]
    )


def test_lift_log_difference_and_long_tail_equal_the_hand_computed_case():
    predictions, entries = popular_and_rare()
    found = evaluate(predictions, entries, ks=(5,), **FAST)
    lists, profiles = [(80 + 70 + 60 + 50 + 40) / 5, (80 + 70 + 60 + 50 + 30) / 5], [75, 10]
    assert value(found, "popularity_lift@5") == pytest.approx(
        (np.mean(lists) - np.mean(profiles)) / np.mean(profiles)
    )

    def logs(counts):
        return np.mean(np.log(np.array(counts) + 1))

    expected = np.mean([logs([80, 70, 60, 50, 40]) - logs([80, 70]), logs([80, 70, 60, 50, 30]) - logs([10])])
    assert value(found, "logpopdiff@5") == pytest.approx(expected)
    assert value(found, "aplt@5") == pytest.approx(3 / 5)  # head: ceil(0.2 * 8) = 2 items, both in both lists


def test_statistical_parity_and_equal_opportunity_equal_the_hand_computed_case():
    predictions, entries = popular_and_rare()
    found = evaluate(predictions, entries, ks=(5,), **FAST)
    rates = np.array([2, 2, 2, 2, 1, 1, 0, 0]) / 2
    assert value(found, "rsp@5") == pytest.approx(rates.std() / rates.mean())
    assert value(found, "reo@5") == pytest.approx(1.0)  # hits of the two groups with targets: 1 and 0


def test_the_targets_row_measures_the_targets_themselves():
    predictions, entries = popular_and_rare()
    shown, history = np.array([1, 0, 0, 0, 0, 0, 0, 1]) / 2, np.arange(80, 0, -10) / 360
    found = evaluate_targets(predictions, entries, ks=(5,), num_bootstrap=20)
    assert found["mgu@5"]["value"] == pytest.approx(np.abs(shown - history).mean())
    assert "ndcg@5" not in found and found["coverage@5"]["value"] == pytest.approx(2 / 8)


# --- provider side


def test_provider_exposure_equals_the_hand_computed_case():
    entries = [entry("i0", 6, "big"), entry("i1", 2, "big"), entry("i2", 2, "small"), entry("i3", 5)]
    found = evaluate([prediction(0, "i0", 1, ["i2", "i3", "i0", "i1"])], entries, ks=(5,), **FAST)
    assert "provider_gini@5" not in found["metrics"]  # K is larger than the catalogue: said, not guessed
    entries.append(entry("i4", 0, "third"))
    found = evaluate([prediction(0, "i0", 1, ["i2", "i3", "i0", "i1", "i4"])], entries, ks=(5,), **FAST)
    big, small, third = 1 / 2 + 1 / math.log2(5), 1.0, 1 / math.log2(6)
    share = np.array([big, small, third]) / (big + small + third)
    assert value(found, "provider_l1_catalogue@5") == pytest.approx(
        np.abs(share - [2 / 4, 1 / 4, 1 / 4]).sum()
    )
    assert value(found, "provider_l1_interactions@5") == pytest.approx(np.abs(share - [0.8, 0.2, 0]).sum())
    assert value(found, "provider_coverage@5") == 1.0
    rates = share / np.array([0.5, 0.25, 0.25])
    assert value(found, "provider_minmax@5") == pytest.approx(rates.min() / rates.max())
    ordered = np.sort(share)
    assert value(found, "provider_gini@5") == pytest.approx((ordered * [-2, 0, 2]).sum() / 3, abs=1e-6)


# --- user side


def test_groups_agree_with_fairlearn():
    metrics = pytest.importorskip(
        "fairlearn.metrics", reason="fairlearn is not installed, so groups cannot be compared with it"
    )
    predictions, entries, _ = world()
    found = evaluate(predictions, entries, num_bootstrap=20)["breakdowns"]["user:gender"]
    gains = np.array([1 / math.log2(p["rank"] + 1) if p["rank"] <= 10 else 0 for p in predictions])
    frame = metrics.MetricFrame(
        metrics=lambda y, p: float(np.mean(p)),
        y_true=gains,
        y_pred=gains,
        sensitive_features=[p["user"]["gender"] for p in predictions],
    )
    for group, expected in frame.by_group.items():
        assert found["groups"][group]["ndcg@10"]["value"] == pytest.approx(expected)
    summary = {part: f["value"] for part, f in found["summary"]["ndcg@10"].items()}
    assert summary["worst"] == pytest.approx(frame.group_min()) and summary["best"] == pytest.approx(
        frame.group_max()
    )
    assert summary["gap"] == pytest.approx(frame.difference()) and summary["ratio"] == pytest.approx(
        frame.ratio()
    )


def test_the_worst_group_of_a_loss_is_the_highest_and_small_groups_are_pooled():
    entries = [entry(f"i{i}", 5) for i in range(12)]
    sizes = {"0": (12, 1.0), "1": (12, 3.0), "2": (3, 8.0), "3": (3, 10.0)}
    predictions = [
        prediction(n, "i0", 1, ["i0"], target_nll=loss, relevance_group=int(g))
        for n, (g, loss) in enumerate((g, loss) for g, (count, loss) in sizes.items() for _ in range(count))
    ]
    found = evaluate(predictions, entries, num_bootstrap=20)
    groups = found["breakdowns"]["relevance_group"]["groups"]
    assert list(groups) == ["0", "1", "(groups under 10)"] and groups["1"]["nll"]["value"] == pytest.approx(
        3.0
    )
    assert value(found, "nll_worst_relevance_group") == pytest.approx(9.0) and value(
        found, "nll_gap_relevance_group"
    ) == pytest.approx(8.0)


def test_the_tail_mean_is_the_mean_of_the_worst_tenth():
    entries = [entry(f"i{i}") for i in range(30)]
    predictions = [prediction(n, "i0", 1 + n, ["i0"], target_nll=float(n)) for n in range(25)]
    found = evaluate(predictions, entries, **FAST)
    assert value(found, "cvar_nll") == pytest.approx((24 + 23 + 0.5 * 22) / 2.5)
    assert value(found, "cvar_rank_share") == pytest.approx((24 + 23 + 0.5 * 22) / 2.5 / 29)


def test_all_breakdowns_are_made_and_an_age_is_cut_at_its_quartiles():
    predictions, entries, _ = world()
    found = evaluate(predictions, entries, num_bootstrap=20)["breakdowns"]
    assert set(found) == {
        "relevance_group",
        "target_popularity",
        "target_in_train",
        "history_length",
        "label:kind",
        "user:gender",
        "user:age",
    }
    assert len(found["user:age"]["groups"]) == 4
    for parts in found.values():
        assert sum(g["ndcg@10"]["n"] for g in parts["groups"].values()) == len(predictions)


def test_a_group_without_a_hit_keeps_an_open_interval():
    predictions = [prediction(n, "i9", 12, ["i0"], user={"side": "x" if n < 19 else "y"}) for n in range(40)]
    found = evaluate(predictions, [entry(f"i{i}", 1) for i in range(20)], num_bootstrap=50)
    hit = found["breakdowns"]["user:side"]["groups"]["x"]["hr@10"]
    assert hit["value"] == 0 and hit["ci_low"] == 0 and hit["ci_high"] == pytest.approx(1 - 0.025 ** (1 / 19))


# --- planted errors: each mutation of the code must break the named check

MUTATIONS = [
    (
        accuracy,
        "gains",
        "inputs.rank + 1",
        "inputs.rank + 2",
        test_hand_computed_accuracy_and_a_missing_rank_is_a_miss,
    ),
    (accuracy, "hit_rates", "<= k", "< k", test_hand_computed_accuracy_and_a_missing_rank_is_a_miss),
    (
        accuracy,
        "_expected_gain",
        "(inputs.num_tied - 1) / 2",
        "0",
        test_a_constant_scorer_scores_exactly_like_chance,
    ),
    (
        inputs,
        "_ranks",
        "np.where(missing, float(num_items), rank)",
        "np.where(missing, 1.0, rank)",
        test_hand_computed_accuracy_and_a_missing_rank_is_a_miss,
    ),
    (
        item_side,
        "_mean_distance",
        "mean(axis=1)",
        "max(axis=1)",
        test_mgu_and_dgu_equal_the_hand_computed_case,
    ),
    (item_side, "_range", "- gap.min(axis=1)", "", test_mgu_and_dgu_equal_the_hand_computed_case),
    (
        inputs,
        "counts_of_bins",
        "return inputs.history_count",
        "return inputs.train_count",
        test_the_convention_of_flower_orders_the_bins_by_occurrences_in_train_histories,
    ),
    (
        item_side,
        "gini_of",
        "size * totals",
        "(size - 1) * totals",
        test_coverage_gini_entropy_and_popularity_agree_with_recbole,
    ),
    (
        item_side,
        "entropy_of",
        "np.log(sums)",
        "np.log2(sums)",
        test_coverage_gini_entropy_and_popularity_agree_with_recbole,
    ),
    (
        inputs,
        "popularity_bins",
        "num_bins - 1)",
        "0)",
        test_popularity_bins_hold_equal_numbers_of_seen_items_and_unseen_items_join_the_last,
    ),
    (
        inputs,
        "_item_labels",
        "1 / len(values)",
        "1.0",
        test_a_genre_share_is_split_over_the_genres_of_an_item,
    ),
    (
        item_side,
        "reo",
        "where=targets > 0",
        "where=targets > 1",
        test_statistical_parity_and_equal_opportunity_equal_the_hand_computed_case,
    ),
    (
        provider_side,
        "catalogue_share",
        "counts.sum()",
        "inputs.num_items",
        test_provider_exposure_equals_the_hand_computed_case,
    ),
    (
        slices,
        "spread",
        "if higher_is_better else",
        "if not higher_is_better else",
        test_groups_agree_with_fairlearn,
    ),
    (
        user_side,
        "tail_mean",
        "-values[valid]",
        "values[valid]",
        test_the_tail_mean_is_the_mean_of_the_worst_tenth,
    ),
]


@pytest.mark.parametrize(
    "module, name, old, new, check",
    MUTATIONS,
    ids=[f"{m[0].__name__.split('.')[-1]}.{m[1]}" for m in MUTATIONS],
)
def test_a_planted_error_is_caught(module, name, old, new, check, monkeypatch):
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    assert old in source, "the mutation no longer applies to the code"
    space: dict = {}
    exec(
        compile("from __future__ import annotations\n" + source.replace(old, new), module.__file__, "exec"),
        module.__dict__ | {},
        space,
    )
    mutated = type(getattr(module, name))(
        space[name].__code__, module.__dict__, name, space[name].__defaults__, space[name].__closure__
    )
    mutated.__kwdefaults__ = space[name].__kwdefaults__
    original = getattr(module, name)
    monkeypatch.setattr(module, name, mutated)
    rows = tuple(
        row
        if row.function is not original and getattr(row.function, "func", None) is not original
        else _replaced(row, original, mutated)
        for row in table.metrics()
    )
    monkeypatch.setattr(table, "metrics", lambda: rows)
    for user in (accuracy, inputs, item_side, provider_side, slices, user_side):
        if getattr(user, name, None) is original:
            monkeypatch.setattr(user, name, mutated)
    with pytest.raises((AssertionError, KeyError)):
        check()


def _replaced(row, original, mutated):
    if row.function is original:
        return replace(row, function=mutated)
    return replace(row, function=functools.partial(mutated, *row.function.args, **row.function.keywords))
