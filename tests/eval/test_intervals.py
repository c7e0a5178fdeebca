"""The bootstrap against plain loops, known truths and Holm's published example; planted errors must fail."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from scipy import sparse

from eval.intervals import (
    Resampled,
    Statistic,
    compare,
    compare_family,
    holm,
    interval,
    mean_statistic,
    resample,
    resampling,
    user_weights,
)
from eval.intervals.comparison import _p_value  # noqa: F401  (a planted error is about it)
from eval.metrics import item_side
from eval.metrics.user_side import tail_mean


def shown_items(lists: np.ndarray, num_items: int) -> sparse.csr_matrix:
    rows = np.repeat(np.arange(lists.shape[0]), lists.shape[1])
    return sparse.csr_matrix((np.ones(lists.size), (rows, lists.ravel())), shape=(lists.shape[0], num_items))


def coverage_statistic(lists: np.ndarray, num_items: int) -> Statistic:
    return Statistic(shown_items(lists, num_items), item_side.coverage_of, lists.shape[0], False, (0, 1))


def test_matrix_products_equal_a_plain_loop_over_replicates():
    rng = np.random.default_rng(0)
    users = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
    values, lists = rng.normal(size=10), rng.integers(0, 12, size=(10, 3))
    found = resample(
        {"mean": mean_statistic(values), "coverage": coverage_statistic(lists, 12)}, users, 40, seed=3
    )
    for b, weights in enumerate(user_weights(6, 40, seed=3)):
        drawn = np.repeat(
            np.arange(10), weights[users].astype(int)
        )  # a drawn user brings all of their samples
        assert found["mean"].replicates[b] == pytest.approx(values[drawn].mean())
        assert found["coverage"].replicates[b] == pytest.approx(len(np.unique(lists[drawn])) / 12)


def test_the_percentile_interval_of_a_mean_agrees_with_scipy_and_with_its_bca():
    values = np.random.default_rng(0).exponential(size=400)
    low, high = interval(resample({"m": mean_statistic(values)}, np.arange(400), 4000)["m"])
    for method in ("percentile", "BCa"):
        theirs = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=4000, method=method, rng=np.random.default_rng(1)
        ).confidence_interval
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.12 * (high - low)), method


def test_chunks_of_replicates_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    statistic = coverage_statistic(rng.integers(0, 50, size=(30, 5)), 50)
    whole = resample({"c": statistic}, np.arange(30), 33)["c"].replicates
    monkeypatch.setattr(resampling, "CHUNK_BYTES", 8 * 50 * 7)
    assert np.array_equal(whole, resample({"c": statistic}, np.arange(30), 33)["c"].replicates)


def test_every_replicate_draws_as_many_users_as_there_are():
    weights = user_weights(57, 200, seed=0)
    assert np.all(weights.sum(axis=1) == 57)
    assert weights.var() == pytest.approx(1 - 1 / 57, rel=0.05)  # multinomial, not a permutation
    assert np.array_equal(weights, user_weights(57, 200, seed=0))


def test_percentile_intervals_of_means_hold_the_truth_about_95_times_in_100():
    rng, hits = np.random.default_rng(5), 0
    for trial in range(200):
        values = rng.exponential(size=150)
        low, high = interval(resample({"m": mean_statistic(values)}, np.arange(150), 400, seed=trial)["m"])
        hits += low <= 1.0 <= high
    assert 0.90 <= hits / 200 <= 0.985


ITEM_STATISTICS = {
    "coverage": (item_side.coverage_of, item_side.coverage_influence),
    "gini": (item_side.gini_of, item_side.gini_influence),
    "entropy": (item_side.entropy_of, item_side.entropy_influence),
}


def share_of_intervals_with_the_truth(linearised: bool) -> dict[str, float]:
    """How often the interval holds the expected value over samples of 200 users, in 100 samples."""
    rng = np.random.default_rng(6)
    chance = rng.dirichlet(np.full(300, 0.5))

    def draw() -> sparse.csr_matrix:
        return shown_items(rng.choice(300, (200, 5), p=chance), 300)

    truths = {
        name: np.mean([finish(np.asarray(draw().sum(axis=0)))[0] for _ in range(200)])
        for name, (finish, _) in ITEM_STATISTICS.items()
    }
    hits = dict.fromkeys(truths, 0)
    for trial in range(100):
        shown = draw()
        found = resample(
            {
                name: Statistic(shown, finish, 200, False, (0, math.inf), influence if linearised else None)
                for name, (finish, influence) in ITEM_STATISTICS.items()
            },
            np.arange(200),
            200,
            seed=trial,
        )
        for name, sample in found.items():
            low, high = interval(sample)
            hits[name] += low <= truths[name] <= high
    return {name: count / 100 for name, count in hits.items()}


def test_intervals_of_coverage_gini_and_entropy_hold_the_truth_where_plain_resampling_is_too_narrow():
    linearised, plain = share_of_intervals_with_the_truth(True), share_of_intervals_with_the_truth(False)
    assert all(share >= 0.9 for share in linearised.values()), linearised
    assert plain["coverage"] < 0.88 and linearised["coverage"] > plain["coverage"], plain


def test_an_influence_is_what_the_value_loses_without_the_user():
    rng = np.random.default_rng(3)
    uneven = np.geomspace(1, 1e-3, 40) / np.geomspace(1, 1e-3, 40).sum()
    shown = shown_items(np.array([rng.choice(40, 4, replace=False, p=uneven) for _ in range(300)]), 40)
    shown.sum_duplicates()
    total = np.asarray(shown.sum(axis=0)).ravel()
    for name, (finish, influence) in ITEM_STATISTICS.items():
        without = np.array([finish((total - shown[u].toarray().ravel())[None, :])[0] for u in range(300)])
        loss = finish(total[None, :])[0] - without
        found = influence(shown, total)
        if (
            name != "coverage"
        ):  # derivatives: right up to a constant, which cancels because every replicate draws U users
            found, loss = found - found.mean(), loss - loss.mean()
        assert np.allclose(found, loss, atol=1e-12 if name == "coverage" else 0.15 * np.abs(loss).max()), name


def test_intervals_of_a_distance_hold_its_expected_value_and_are_centred():
    rng, chance, history = np.random.default_rng(4), np.array([0.3, 0.3, 0.2, 0.1, 0.1]), np.full(5, 0.2)

    def distance(totals: np.ndarray) -> np.ndarray:
        return np.abs(totals / totals.sum(axis=1, keepdims=True) - history).mean(axis=1)

    truth = np.mean([distance(rng.multinomial(300, chance)[None, :])[0] for _ in range(2000)])
    hits = 0
    for trial in range(150):
        features = np.eye(5)[rng.choice(5, 300, p=chance)]
        low, high = interval(
            resample(
                {"d": Statistic(features, distance, 300, False, (0, 2))}, np.arange(300), 300, seed=trial
            )["d"]
        )
        hits += low <= truth <= high
    assert hits / 150 >= 0.9
    uneven = Resampled(
        1.0, np.linspace(1.5, 2.5, 101), 100, False, (0.8, math.inf)
    )  # mean 2: moved down by one, cut at the range
    assert interval(uneven) == pytest.approx((0.8, 1.475))


def test_two_identical_runs_differ_by_nothing_and_the_verdict_says_so():
    values = np.random.default_rng(0).random(80)
    found = resample({"ndcg": mean_statistic(values)}, np.arange(80), 300)
    row = compare_family(found, found, ["ndcg"], {"ndcg": True})["ndcg"]
    assert (row.difference, row.p_value, row.effect_size) == (
        0.0,
        1.0,
        0.0,
    ) and row.verdict == "interval spans zero"


def test_a_planted_difference_is_found_by_pairing_and_missed_without_it():
    rng = np.random.default_rng(2)
    hard = rng.normal(size=300) * 3  # users differ much more than the runs do
    first, second = hard + rng.normal(size=300) * 0.2, hard + 0.1 + rng.normal(size=300) * 0.2
    found = [
        resample({"nll": mean_statistic(v)}, np.arange(300), 1000, seed=0)["nll"] for v in (first, second)
    ]
    row = compare(found[0], found[1])
    assert row.ci_low > 0 and row.p_value < 0.01
    assert row.effect_size == pytest.approx(
        (second - first).mean() / (second - first).std(ddof=1), rel=0.1
    )  # Cohen's d_z
    other = resample({"nll": mean_statistic(second)}, np.arange(300), 1000, seed=1)["nll"]
    assert compare(found[0], other).ci_low < 0  # other draws are no pairing


def test_p_values_without_a_difference_fall_below_5_percent_about_5_times_in_100():
    rng, below = np.random.default_rng(8), 0
    for trial in range(200):
        found = [
            resample({"m": mean_statistic(rng.normal(size=80))}, np.arange(80), 300, seed=trial)["m"]
            for _ in range(2)
        ]
        below += compare(found[0], found[1]).p_value <= 0.05
    assert 0.015 <= below / 200 <= 0.10


@pytest.mark.parametrize("users", [3, 5, 10, 20])
def test_few_users_do_not_make_equal_runs_differ(users):
    """Both ways to call two runs different, the p-value and the interval, are wrong 5 times in 100."""
    rng, by_p, by_interval, trials = np.random.default_rng(users), 0, 0, 300
    for trial in range(trials):
        found = [
            resample({"m": mean_statistic(rng.normal(size=users))}, np.arange(users), 300, seed=trial)["m"]
            for _ in range(2)
        ]
        row = compare(found[0], found[1])
        by_p += row.p_value <= 0.05
        by_interval += row.ci_low > 0 or row.ci_high < 0
    assert by_p / trials <= 0.09 and by_interval / trials <= 0.09


def test_one_user_shows_nothing():
    """All samples of a user are drawn together, so thirty windows of one user are one draw."""
    found = [
        resample({"nll": mean_statistic(np.full(30, loss))}, np.zeros(30, int), 200)["nll"] for loss in (3, 4)
    ]
    assert np.isnan(interval(found[0])).all()
    row = compare_family({"nll": found[0]}, {"nll": found[1]}, ["nll"], {"nll": False})["nll"]
    assert row.difference == 1 and np.isnan([row.ci_low, row.ci_high, row.p_value]).all()
    assert row.verdict == "too few users to say"


@pytest.mark.parametrize("users, p_value", [(3, 0.25), (5, 0.0625), (29, 1 / 201)])
def test_the_same_difference_for_each_of_a_few_users_is_as_rare_as_their_having_one_sign(users, p_value):
    """Without any spread the bootstrap cannot tell how rare it is."""
    found = [
        resample({"hr": mean_statistic(np.full(users, value))}, np.arange(users), 200)["hr"]
        for value in (0, 1)
    ]
    assert compare(found[0], found[1]).p_value == pytest.approx(p_value)


def test_what_rounding_leaves_of_a_constant_difference_is_no_spread():
    """Sums of other numbers differ in their last bits, so that the replicates of a constant do too."""
    users = np.arange(6)
    losses = 1000 * np.random.default_rng(0).normal(4, 1, 6)
    found = [
        resample({"nll": mean_statistic(values)}, users, 1000)["nll"] for values in (losses, losses + 0.1)
    ]
    assert compare(found[0], found[1]).p_value == pytest.approx(2**-5)
    alone = compare_family({"nll": found[0]}, {"nll": found[1]}, ["nll"], {"nll": False})["nll"]
    assert alone.verdict == "worse" and math.isnan(alone.effect_size)
    doubled = {name: found for name in ("nll", "same")}
    pair = [{name: runs[place] for name, runs in doubled.items()} for place in (0, 1)]
    row = compare_family(*pair, ["nll", "same"], {"nll": False, "same": False})["nll"]
    assert row.p_holm == pytest.approx(2 * 2**-5) and row.ci_holm[0] == pytest.approx(0.1)
    assert row.verdict == "not shown after Holm's correction"
    hair = [
        resample({"nll": mean_statistic(values)}, users, 1000)["nll"] for values in (losses, losses + 1e-12)
    ]
    none = compare_family({"nll": hair[0]}, {"nll": hair[1]}, ["nll"], {"nll": False})["nll"]
    assert (none.p_value, none.effect_size, none.verdict) == (1.0, 0.0, "interval spans zero")


def test_a_tail_of_rank_shares_stays_in_its_range():
    shares = np.where(np.arange(40) < 4, 0.97, 0.1)
    sample = resample({"tail": tail_mean(shares, False, bounds=(0, 1))}, np.arange(40), 300)["tail"]
    assert interval(sample)[1] <= 1 < interval(replace(sample, bounds=(-np.inf, np.inf)))[1]


def test_users_without_a_hit_are_counted_and_not_their_samples():
    found = resample({"hr": mean_statistic(np.zeros(500), (0, 1))}, np.repeat(np.arange(5), 100), 200)["hr"]
    assert found.units == 5
    assert interval(found) == pytest.approx((0, 1 - 0.025 ** (1 / 5)))
    values = np.where(np.arange(500) < 200, 0.0, np.nan)  # three users have no value
    found = resample({"hr": mean_statistic(values, (0, 1))}, np.repeat(np.arange(5), 100), 200)["hr"]
    assert found.units == 2


def test_nearly_identical_runs_are_not_told_apart_by_a_maximum():
    """One user of 300 differs a little: the interval of the worst group's difference begins above zero."""
    rng = np.random.default_rng(13)
    groups = rng.integers(0, 4, 300)
    first = rng.exponential(size=300)
    worst = np.flatnonzero(groups == np.argmax([first[groups == g].mean() for g in range(4)]))[0]
    second = first.copy()
    second[worst] += 0.001

    def largest(totals: np.ndarray) -> np.ndarray:
        return np.nanmax(totals[:, :4] / totals[:, 4:], axis=1)

    member = np.eye(4)[groups]
    found = []
    for values in (first, second):
        features = np.concatenate([member * values[:, None], member], axis=1)
        statistic = Statistic(features, largest, 300, False, (0, math.inf))
        found.append(resample({"worst": statistic}, np.arange(300), 1000))
    row = compare_family(found[0], found[1], [], {"worst": False})["worst"]
    assert row.ci_low > 0, "the case that a verdict by the interval alone gets wrong"
    assert row.verdict == "interval spans zero"


def test_the_minimum_detectable_difference_is_found_about_80_times_in_100():
    rng, caught = np.random.default_rng(9), 0
    detectable = None
    for trial in range(200):
        first = rng.normal(size=120)
        shift = 0.0 if detectable is None else detectable
        found = [
            resample({"m": mean_statistic(v)}, np.arange(120), 300, seed=trial)["m"]
            for v in (first, first + shift + rng.normal(size=120))
        ]
        row = compare(found[0], found[1])
        if detectable is None:
            detectable = 2.8016 / math.sqrt(120)
            assert row.minimum_detectable == pytest.approx(detectable, rel=0.2)
        else:
            caught += row.ci_low > 0
    assert 0.70 <= caught / 199 <= 0.90


def test_an_effect_size_is_over_the_users_that_a_metric_rests_on():
    """A slice of 40 users has the effect of these 40, whatever the size of the split."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=200), rng.normal(0.4, 1, size=200)
    kept = np.arange(200) < 40
    users = np.arange(200)
    found = [
        resample({"nll": mean_statistic(np.where(kept, values, np.nan))}, users, 1000)["nll"]
        for values in (first, second)
    ]
    difference = (second - first)[kept]
    assert compare(found[0], found[1]).effect_size == pytest.approx(
        difference.mean() / difference.std(ddof=1), rel=0.1
    )


def providers_shown(users_of_each: list[int]) -> Resampled:
    """Coverage of 20 providers, shown to so many of 200 users each."""
    features = sparse.lil_matrix((200, 20))
    for provider, users in enumerate(users_of_each):
        features[:users, provider] = 1
    statistic = Statistic(
        features.tocsr(), item_side.coverage_of, 200, False, (0, 1), item_side.coverage_influence
    )
    return resample({"coverage": statistic}, np.arange(200), 400)["coverage"]


def test_coverage_that_no_user_alone_changes_has_no_interval_and_no_verdict():
    """Two users of 200 were shown a further provider: other users could well have shown nothing of it."""
    pair = [providers_shown([100] * 18), providers_shown([100] * 18 + [2])]
    assert pair[1].value - pair[0].value == pytest.approx(0.05)
    assert np.isnan([interval(sample) for sample in pair]).all()
    row = compare_family({"c": pair[0]}, {"c": pair[1]}, [], {"c": True})["c"]
    assert np.isnan([row.ci_low, row.ci_high, row.p_value, row.minimum_detectable]).all()
    assert row.verdict == "no user alone changes it"
    equal = compare(pair[0], providers_shown([90] * 18))
    assert (equal.p_value, equal.ci_low, equal.ci_high) == (1.0, 0.0, 0.0)
    one_user = compare_family({"c": pair[0]}, {"c": providers_shown([100] * 18 + [1])}, [], {"c": True})["c"]
    assert one_user.p_value > 0.05 and one_user.ci_high > one_user.ci_low


def test_holm_adjusts_as_computed_by_hand_and_leaves_undefined_values_out():
    adjusted, levels = holm([0.01, 0.04, 0.03, 0.005, float("nan")])
    assert adjusted[:4].tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02]) and math.isnan(adjusted[4])
    assert levels[:4].tolist() == pytest.approx([0.05 / 3, 0.05, 0.05 / 2, 0.05 / 4])


def test_what_only_the_correction_takes_away_is_called_so():
    rng = np.random.default_rng(11)
    names = [f"m{i}" for i in range(8)]
    values = {n: (rng.normal(size=200), rng.normal(size=200)) for n in names}
    first, noise = values["m0"]
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    values["m0"] = (first, first + noise + 2.25 / math.sqrt(200))  # 2.25 standard errors: p about 0.025
    runs = [
        resample({n: mean_statistic(v[i]) for n, v in values.items()}, np.arange(200), 2000) for i in (0, 1)
    ]
    row = compare_family(runs[0], runs[1], names, {n: True for n in names})["m0"]
    assert row.ci_low > 0 and row.ci_holm[0] < 0 and row.p_holm > 0.05
    assert row.verdict == "interval spans zero after Holm's correction"
    alone = compare_family(runs[0], runs[1], ["m0"], {n: True for n in names})["m0"]
    assert alone.verdict == "better" and alone.p_holm == pytest.approx(alone.p_value)


@pytest.mark.parametrize(
    "name, old, new, check",
    [
        (
            "user_weights",
            "size=(num_bootstrap, num_users))",
            "size=(num_bootstrap, num_users // 2))",
            test_every_replicate_draws_as_many_users_as_there_are,
        ),
        (
            "interval",
            "+ (sample.value - mean)",
            "+ 0.0",
            test_intervals_of_a_distance_hold_its_expected_value_and_are_centred,
        ),
        (
            "resample",
            "(weights - 1) @",
            "0.3 * (weights - 1) @",
            test_intervals_of_coverage_gini_and_entropy_hold_the_truth_where_plain_resampling_is_too_narrow,
        ),
        (
            "interval",
            "(1 - level) / 2, (1 + level) / 2]",
            "0.25, 0.75]",
            test_percentile_intervals_of_means_hold_the_truth_about_95_times_in_100,
        ),
        (
            "holm",
            "(tested.size - j) * p[index]",
            "tested.size * p[index]",
            test_holm_adjusts_as_computed_by_hand_and_leaves_undefined_values_out,
        ),
        (
            "_p_value",
            "finite - finite.mean()",
            "finite",
            test_p_values_without_a_difference_fall_below_5_percent_about_5_times_in_100,
        ),
        (
            "resample",
            "weights = user_weights(num_users, num_bootstrap, seed)",
            "weights = user_weights(num_users, num_bootstrap, seed)[:, ::-1]",
            test_matrix_products_equal_a_plain_loop_over_replicates,
        ),
    ],
    ids=[
        "too few draws",
        "interval not centred",
        "influence too small",
        "narrow interval",
        "Bonferroni",
        "null not centred",
        "draws of other users",
    ],
)
def test_a_planted_error_is_caught(name, old, new, check, monkeypatch):
    module = inspect.getmodule(globals()[name])
    source = inspect.getsource(globals()[name])
    assert old in source, "the mutation no longer applies to the code"
    space = dict(module.__dict__)
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), "mutated", "exec"), space)
    monkeypatch.setitem(globals(), name, space[name])
    monkeypatch.setattr(module, name, space[name])
    with pytest.raises((AssertionError, ValueError, IndexError)):
        check()
