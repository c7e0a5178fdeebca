"""Each planted bias makes the right audit speak and no other; permuted labels silence every audit."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from planted_context import HONEST_DATA, PlantedContext
from run_folders import make_run

from eval.audit import AuditOptions, run_audits
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap, least_squares, spearman
from eval.audit.model import dimensionality, position, pretraining, provider, selection, shift, titles
from eval.audit.model.amplification import measure_change, measure_step
from eval.audit.runs import cross_tuning
from eval.audit.score_rows import exposure, probabilities, target_gains, target_hits, target_ranks, top_lists
from eval.intervals.interval import widening
from eval.loading import load_subject
from eval.report import figures
from gdrt_ds.inference import catalogue_scoring
from gdrt_ds.runtime import Runtime

OPTIONS = AuditOptions(users=40, num_bootstrap=200, permutations=3)
RIGHT = {
    "position": {"position"},
    "popularity": {"pretraining"},
    "provider": {"provider"},
    "shortcut": {"sensitivity", "language"},
}
DETECTORS = ["sensitivity", "language", "pretraining", "provider", "position"]


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return load_subject(
        Runtime(), run=str(make_run(tmp_path_factory.mktemp("planted") / "run", [HONEST_DATA]))
    )


@pytest.mark.parametrize("plant", [None, *RIGHT])
def test_only_the_right_audit_speaks_about_a_planted_bias(subject, plant):
    found = run_audits(DETECTORS, PlantedContext(subject, Runtime(), OPTIONS, plant))
    assert {name for name, audit in found.items() if audit["speaks"]} == RIGHT.get(plant, set())
    for audit in found.values():
        assert all(figures.checked(f) for f in audit["figures"]) and audit["control"] and audit["cost"]


def test_the_strength_of_a_planted_prior_is_found_and_popularity_stands_beside_it():
    rng = np.random.default_rng(0)
    prior, popularity = rng.normal(size=400), rng.poisson(20, size=400).astype(float)
    noise = rng.normal(size=400)
    log_popularity = (np.log1p(popularity) - np.log1p(popularity).mean()) / np.log1p(popularity).std()
    found = pretraining.measure(0.8 * prior + 0.5 * log_popularity + 0.3 * noise, prior, popularity, 200)
    spread = np.sqrt(0.64 * prior.var() + 0.25 + 0.09)
    assert found["beta: prior"].value == pytest.approx(0.8 * prior.std() / spread, abs=0.05)
    assert found["beta: popularity"].value == pytest.approx(0.5 / spread, abs=0.05)
    assert found["partial R2: prior"].value == pytest.approx(0.64 / 0.73, abs=0.05)
    silent = pretraining.measure(0.8 * prior + 0.3 * noise, rng.permutation(prior), popularity, 200)
    assert silent["beta: prior"].spans_null and abs(silent["beta: prior"].value) < 0.15


def test_permuting_labels_kills_the_position_effect():
    rng = np.random.default_rng(1)
    rise = np.linspace(0.1, 0.5, 5)[None] + rng.normal(size=(40, 5)) * 0.05
    observed, p, null, curve = position.measure_probe(rise, 200, 0)
    assert (
        p < 0.01 and observed.low > null.max() and [c.value for c in curve] == sorted(c.value for c in curve)
    )
    above, off, width = 0, 0.0, 0.0
    for seed in range(20):
        flat = np.abs(rng.normal(1, 1, size=(40, 5)))
        same, p, _, _ = position.measure_probe(flat, 100, seed)
        above += same.low > same.null
        off += (same.low + same.high) / 2 - same.value
        width += same.high - same.low
    assert p > 0.05 and above <= 3
    assert off < 0.1 * width, "a resample spreads more than the users do"


def test_orders_that_change_nothing_agree_perfectly_and_another_user_does_not():
    rng = np.random.default_rng(2)
    true = rng.normal(size=(8, 60))
    other, targets = rng.normal(size=(8, 60)), rng.integers(60, size=8)
    found = position.measure_orders(true, np.repeat(true[:, None], 3, axis=1), other, targets, 50, 0)
    assert found["Jaccard@10, other orders"].value == found["Kendall tau, other orders"].value == 1.0
    assert (
        found["RBO, other orders"].value == pytest.approx(1.0)
        and found["NDCG@10 spread over orders"].value == 0.0
    )
    assert (
        found["Jaccard@10, another user"].value < 0.4 and abs(found["Kendall tau, another user"].value) < 0.2
    )
    assert found["change by order / change by another user (1 - RBO)"].value == pytest.approx(0.0, abs=1e-9)


def test_only_equal_finite_scores_agree_whatever_their_order():
    equal, rising = np.full(20, -3.0), np.arange(20.0)
    assert position.agreement(equal, equal)[0] == 1.0 and position.agreement(rising, rising)[0] == 1.0
    broken = rising.copy()
    broken[3] = np.nan
    assert np.isnan(position.agreement(broken, rising)[0]) and np.isnan(position.agreement(equal, rising)[0])
    assert np.isnan(position.agreement(equal * np.nan, equal * np.nan)[0])


def test_a_skewed_provider_is_found_whatever_the_items_popularity_and_permuted_labels_are_not():
    rng = np.random.default_rng(3)
    popularity, provider_of = rng.pareto(1.5, size=300) * 20, rng.integers(10, size=300)
    follow = np.log(popularity + 1)[None] + rng.gumbel(size=(80, 300))
    rows = provider.discounted(top_lists(follow + 2.0 * (provider_of == 0), 10), 300)
    found, p, _ = provider.measure(rows, popularity, provider_of, 100)
    assert p <= 0.01 and found["excess over permuted labels"].low > 0
    _, p, _ = provider.measure(rows, popularity, rng.permutation(provider_of), 100)
    assert p > 0.05
    assert np.allclose(rows.sum(axis=1), 1) and rows.max() == pytest.approx(
        1 / (1 / np.log2(np.arange(10) + 2)).sum()
    )


def test_lists_drawn_from_the_data_are_not_called_concentrated_and_one_list_for_all_is():
    rng = np.random.default_rng(4)
    popularity = rng.pareto(1.5, size=300) * 20
    same, p, _ = titles.measure(titles.drawn_lists(popularity, 60, 10, rng), popularity, 100)
    assert p > 0.05
    one = np.tile(np.arange(10), (60, 1))
    found, p, _ = titles.measure(one, popularity, 100)
    assert (
        p <= 0.01
        and found["exposure share of the most shown"].value == 1.0
        and found["Gini of exposure"].value > 0.9
    )
    assert same["exposure share of the most shown"].value < 0.8


@pytest.mark.parametrize("skewed", [False, True])
def test_the_interval_of_a_concentration_holds_its_own_value(skewed):
    """Repeated users make a set of lists look more concentrated than it is: by itself that shows nothing."""
    rng = np.random.default_rng(40 + skewed)
    popularity = rng.pareto(1.5, size=300) * 20 if skewed else np.full(300, 9.0)
    above = 0
    for seed in range(20):
        lists = titles.drawn_lists(popularity, 64, 10, rng)
        found, _, _ = titles.measure(lists, popularity, 100, seed)
        for estimate in found.values():
            assert estimate.low <= estimate.value <= estimate.high
        above += found[titles.EXCESS].low > 0
    assert above <= 3


def test_the_distance_of_providers_that_only_noise_moves_is_not_shown():
    rng, above = np.random.default_rng(50), 0
    popularity, provider_of = rng.pareto(1.5, size=300) * 20, rng.integers(10, size=300)
    for seed in range(20):
        rows = provider.discounted(titles.drawn_lists(popularity, 64, 10, rng), 300)
        found, _, _ = provider.measure(rows, popularity, provider_of, 100, seed)
        for estimate in found.values():
            assert estimate.low <= estimate.value <= estimate.high
        above += found[provider.EXCESS].low > 0
    assert above <= 3


def test_a_curved_statistic_at_the_end_of_its_range_has_no_interval():
    def largest_share(rows):
        return rows.mean(axis=0).max()

    lists = np.zeros((30, 4))
    lists[:, 2] = 1  # every list is the same title
    found = bootstrap(lists, largest_share, null=0.25, num=50, bounds=(0, 1))
    assert found.value == 1 and np.isnan([found.low, found.high]).all() and found.spans_null
    assert found.text() == "1 (no interval)" and found.as_dict()["ci_low"] is None
    lists[:10] = [1, 0, 0, 0]
    inside = bootstrap(lists, largest_share, null=0.25, num=50, bounds=(0, 1))
    assert 0 < inside.low < inside.value < inside.high <= 1


def test_slots_that_draw_choices_are_found_beside_the_main_score_and_permuted_slots_are_not():
    rng = np.random.default_rng(5)
    slots = selection.popularity_slots(rng.permutation(400).astype(float))
    assert np.bincount(slots)[0] < np.bincount(slots)[-1] and slots.min() == 0
    scores = np.log(probabilities(rng.normal(size=(300, 400))))
    planted = np.where(slots == 0, 3.0, 0.0)

    def choose(bonus):
        return np.argmax(scores + bonus + rng.gumbel(size=scores.shape), axis=1)

    mass, targets = selection.slot_mass(scores, slots), choose(planted)
    b = selection.fit_tower(mass, slots[targets])
    assert b.argmax() == 0 and b[0] - np.median(b[1:]) == pytest.approx(3.0, abs=0.6)
    plain = selection.fit_tower(mass, slots[choose(0.0)])
    assert plain.std() < 0.5 * b.std()
    moved = rng.permutation(slots)
    assert selection.fit_tower(selection.slot_mass(scores, moved), moved[targets]).std() < 0.6 * b.std()
    weights = selection.inverse_propensity(b, slots[targets])
    assert (
        weights[slots[targets] == 0].max() < weights[slots[targets] > 2].min()
        and weights.max() <= selection.CLIP * weights.min() + 1e-9
    )
    tower, _ = selection.measure(
        lambda rows: selection.fit_tower(mass[rows], slots[targets][rows]),
        slots[targets],
        target_hits(scores, targets),
        target_gains(scores, targets),
        100,
        0,
    )
    assert tower[0].low > 0
    nll = rng.normal(size=300) + 2.0 * (
        np.arange(300) % 4 == 0
    )  # logged slots: what stood on top was chosen though little relevant
    assert selection.fit_labelled(nll, np.arange(300) % 4, 4).argmax() == 0


def test_every_resample_weighs_its_metrics_with_terms_of_its_own():
    slots = np.arange(40) % 2
    hits = slots.astype(float)

    def fit(rows):  # even terms for all users, and uneven ones for every resample of them
        even = rows.tolist() == list(range(40))
        return np.zeros(2) if even else np.array([3.0, -3.0])

    _, found = selection.measure(fit, slots, hits, hits, 100, 0)
    weighed = found["HR@10, inverse propensity"]
    assert weighed.value == 0.5 < 0.7 < weighed.low and found["HR@10"].low < 0.5 < found["HR@10"].high


def test_the_terms_of_few_users_have_wide_intervals():
    terms = np.random.default_rng(3).normal(size=(12, 2))
    zeros = np.zeros(12)
    tower, _ = selection.measure(
        lambda rows: terms[rows].mean(axis=0), zeros.astype(int), zeros, zeros, 100, 0
    )
    rng = np.random.default_rng(0)
    replicates = np.array([terms[rng.integers(0, 12, 12)].mean(axis=0) for _ in range(100)])
    low, high = np.quantile(replicates[:, 0], [0.025, 0.975])
    assert tower[0].high - tower[0].low == pytest.approx(widening(12) * (high - low)) and widening(12) > 1.1


def test_a_logged_slot_that_resamples_lack_has_the_mean_relevance_there():
    rng = np.random.default_rng(0)
    place = np.append(rng.integers(0, 5, 39), 5)  # one of 40 choices stood in the last slot
    nll = rng.normal(4, 1, 40)
    nll[-1] = nll.max() + 3  # and was the least relevant one
    samples = [SimpleNamespace(labels={"slot": str(slot + 1)}) for slot in place]
    found = selection.logged_slots("slot", samples, nll, rng)
    tower, _ = selection.measure(found.fit, found.of_target, np.ones(40), np.ones(40), 100, 0)
    assert [term.n for term in tower] == [40] * 6 and found.names[-1] == "slot 6"
    without = found.fit(np.arange(39))
    # The mean relevance of all choices, as relevance is measured among them, less the mean over slots.
    relevance = np.exp(-(nll[:39] - nll[:39].min()) / nll[:39].std())
    sums = np.bincount(place[:39], weights=relevance, minlength=6) + 0.5 * relevance.mean()
    by_hand = -np.log(sums / (np.bincount(place[:39], minlength=6) + 0.5))
    assert by_hand[-1] == pytest.approx(-np.log(relevance.mean()))
    assert without == pytest.approx(by_hand - by_hand.mean())
    assert tower[-1].low < without[-1] < tower[-1].value


def test_effective_rank_counts_directions_and_permuted_columns_have_all_of_them():
    rng = np.random.default_rng(6)
    low = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 120))
    assert (
        dimensionality.effective_rank(low) == pytest.approx(3, abs=0.3)
        and dimensionality.effective_rank(np.ones((5, 7)) * rng.normal(size=7)) == 0
    )
    targets, popularity = rng.integers(120, size=40), np.arange(120.0)
    found = dimensionality.measure(low, targets, popularity, 100)
    assert found["effective rank / control"].high < 0.2
    broken = dimensionality.measure(dimensionality.shuffled_columns(low, rng), targets, popularity, 100)
    assert (
        broken["effective rank / control"].value == pytest.approx(1, abs=0.05)
        and broken["effective rank / control"].spans_null
    )


def test_so_few_users_that_every_half_has_rank_one_give_no_interval():
    scores = np.random.default_rng(6).normal(size=(6, 50))
    few = dimensionality.measure(scores[:5], np.arange(5), np.arange(50.0), 50)[dimensionality.RATIO]
    assert np.isfinite(few.value) and np.isnan([few.low, few.high]).all() and "(no interval)" in few.text()
    six = dimensionality.measure(scores, np.arange(6), np.arange(50.0), 50)[dimensionality.RATIO]
    assert six.low < six.value < six.high


def test_head_targets_that_rank_higher_open_the_head_tail_gap():
    popularity, targets = np.arange(100.0)[::-1], np.arange(100)
    scores = np.tile(popularity, (100, 1)) + np.random.default_rng(0).normal(size=(100, 100)) * 0.1
    assert (
        dimensionality.measure(scores, targets, popularity, 100)["head-tail gap of relative rank"].low > 0.3
    )
    assert dimensionality.measure(scores, targets, np.random.default_rng(1).permutation(popularity), 100)[
        "head-tail gap of relative rank"
    ].spans_null


def test_an_environment_that_costs_more_is_found_and_permuted_labels_are_not():
    rng = np.random.default_rng(7)
    labels = np.array(["early", "late"] * 60)
    nll = rng.normal(size=120) + 5 + 1.5 * (labels == "late")
    rows, tests = shift.measure(
        nll, np.zeros(120), {"time": labels, "length": rng.permutation(labels)}, 200, 0
    )
    drops = {(row.axis, row.name): row.drop for row in rows}
    assert tests["time"].p <= 0.05 < tests["length"].p
    assert drops["time", "late"].low > 0 > drops["time", "early"].high and drops["length", "late"].spans_null
    assert (
        shift.noisy("Princess Bride, The (1987)") == "Pirncess Bride, The (1987)"
        and shift.noisy("abc") == "abc"
    )
    share = np.array([8.0, 1, 1, 0])
    assert (
        shift.popularity_shift(np.array([3] * 30), share, 0)[0] == 1.0
        and shift.popularity_shift(rng.choice(4, 200, p=share / 10), share, 0)[2] > 0.05
    )


def test_the_batch_and_the_bound_of_the_scoring_are_those_of_its_audits(subject, monkeypatch):
    sizes = []

    class Counted(PlantedContext):
        def score_batch(self, histories):
            sizes.append(len(histories))
            return super().score_batch(histories)

        def loss_batch(self, rows, *others):
            sizes.append(len({tuple(prompt) for prompt, _ in rows}))
            return super().loss_batch(rows, *others)

    run_audits(["shift", "sensitivity"], Counted(subject, Runtime(), replace(OPTIONS, batch_size=3)))
    assert 3 in sizes and max(sizes) == 3
    bounds = []
    scorer = catalogue_scoring.CatalogueScorer

    def told(*words, **options):
        bounds.append(options["max_bytes"])
        return scorer(*words, **options)

    monkeypatch.setattr(catalogue_scoring, "CatalogueScorer", told)
    context = AuditContext(subject, Runtime(), replace(OPTIONS, max_score_bytes=64 << 20))
    context.scores([subject.samples[0].history], "scores")
    assert bounds == [64 << 20]


def test_two_users_make_no_environment_that_is_the_worst(subject):
    options = AuditOptions(users=2, num_bootstrap=200)
    found = run_audits(["shift"], PlantedContext(subject, Runtime(), options))["shift"]
    assert found["finding"].startswith("No environment has 5 users, so none is the worst; environments ")
    assert found["effect"]["value"] is None and found["effect"]["ci_low"] is None and not found["speaks"]


def test_users_that_are_alike_make_no_environment():
    worst, effect = shift.measure_worst(np.ones(30), {}, 50, 0)
    assert worst is None and np.isnan(effect.value)
    assert shift.in_words({}, worst, effect).startswith("Users do not differ in time, ")
    rows, tests = shift.measure(np.ones(30), np.ones(30), {}, 50, 0)
    assert rows == [] and tests == {}


def test_the_worst_of_many_environments_that_noise_made_is_not_shown_and_a_planted_one_is():
    rng = np.random.default_rng(12)
    names = {axis: [f"{axis} {place}" for place in range(4)] for axis in ("a", "b", "c")}
    above, moved = 0, 0
    for seed in range(20):
        axes = {axis: rng.choice(of_axis, 80) for axis, of_axis in names.items()}
        nll = 5 + rng.normal(size=80)
        worst, effect = shift.measure_worst(nll, axes, 200, seed)
        (axis,) = [axis for axis, of_axis in names.items() if worst in of_axis]
        own = axes[axis] == worst
        assert effect.value == pytest.approx((nll[own].mean() - nll.mean()) / nll.mean())
        assert effect.low < effect.value < effect.high and effect.null > 0
        above += effect.low > effect.null
        nll[axes["a"] == "a 1"] += 4
        worst, effect = shift.measure_worst(nll, axes, 200, seed)
        moved += worst == "a 1" and effect.low > effect.null
    assert above <= 2 and moved == 20


def test_an_environment_of_few_users_is_never_the_worst():
    labels = np.array(["many"] * 30 + ["more"] * 30 + ["few"] * 4)
    nll = np.array([4.0] * 30 + [6.0] * 30 + [50.0] * 4)
    worst, effect = shift.measure_worst(nll, {"axis": labels}, 50, 0)
    assert worst == "more" and effect.value == pytest.approx(6 / nll.mean() - 1)
    nll[0] = np.nan
    words = shift.in_words({"axis": labels}, *shift.measure_worst(nll, {"axis": labels}, 50, 0))
    assert words.startswith("The NLL of some target is not finite")


def test_growth_of_the_bases_favourites_is_found_and_permuted_steps_are_not():
    rng = np.random.default_rng(8)
    first, last = rng.uniform(0, 0.4, size=30), rng.uniform(0.3, 0.8, size=30)
    effect, p, null = measure_change(first, last, 200, 0)
    assert p <= 0.01 and effect.low > 0 and np.abs(null).max() < effect.value
    flip = rng.random(30) < 0.5
    effect, p, _ = measure_change(np.where(flip, first, last), np.where(flip, last, first), 200, 0)
    assert p > 0.05 and effect.spans_null
    scores, membership, favoured = (
        np.log(probabilities(rng.normal(size=(4, 20)))),
        np.eye(20)[:, :2] * 0,
        np.arange(20) < 2,
    )
    membership[:10, 0], membership[10:, 1] = 1, 1
    mean = probabilities(scores).mean(axis=0)
    step = measure_step(scores, mean, np.full(20, 0.05), membership, favoured)
    assert (
        step.kl_base == pytest.approx(0)
        and step.kl_data > 0
        and step.bins.sum() == pytest.approx(1)
        and len(step.favoured) == 4
    )


def test_biases_planted_by_backbone_cluster_by_backbone_and_not_by_data_or_seed():
    rng = np.random.default_rng(9)
    backbone, data, seed = (
        np.repeat(["a", "b"], 8),
        np.tile(np.repeat(["x", "y"], 4), 2),
        np.tile(["0", "1", "2", "3"], 4),
    )
    vectors = cross_tuning.standardised(rng.normal(size=(16, 6)) + 3.0 * (backbone == "b")[:, None])
    found = cross_tuning.measure(vectors, {"backbone": backbone, "data": data, "seed": seed})
    assert (
        found.clusterings["backbone"].p <= 0.05
        and found.clusterings["data"].p > 0.05
        and found.clusterings["seed"].p > 0.05
    )
    assert found.clusterings["backbone"].silhouette.low > 0.2
    shares = found.shares
    assert (
        np.allclose(sum(shares.values()), 1) and shares["backbone"].mean() > 0.5 > 0.2 > shares["data"].mean()
    )
    permuted = cross_tuning.measure(vectors, {"backbone": np.random.default_rng(4).permutation(backbone)})
    assert permuted.clusterings["backbone"].p > 0.05


def test_the_finding_is_about_the_factor_that_is_shown():
    def clustering(value, p):
        return cross_tuning.Clustering(Estimate(value, value - 0.1, value + 0.1, 8), 0.0, p)

    shown = {"backbone": clustering(0.3, 0.01), "objective": clustering(0.5, 0.2)}
    assert cross_tuning.foremost(shown) == "backbone"
    shown["data"] = clustering(0.4, 0.05)
    assert cross_tuning.foremost(shown) == "data"
    assert cross_tuning.foremost({name: clustering(v, 0.3) for name, v in (("a", 0.1), ("b", 0.2))}) == "b"


def test_silhouette_equals_a_hand_computed_case():
    vectors = np.array([[0.0], [1.0], [10.0], [12.0]])
    labels = np.array(["p", "p", "q", "q"])
    expected = np.mean([(11 - 1) / 11, (10 - 1) / 10, (9.5 - 2) / 9.5, (11.5 - 2) / 11.5])
    assert cross_tuning.silhouette(vectors, labels) == pytest.approx(expected)


def test_statistics_equal_hand_computed_cases_and_scipy():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(10)
    x, y = rng.integers(5, size=50).astype(float), rng.normal(size=50)
    assert (
        spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
        and spearman(np.ones(4), np.arange(4.0)) == 0
    )
    scores = np.array([[1.0, 3.0, 3.0, np.nan], [0.0, 0.0, 0.0, 0.0]])
    assert (
        target_ranks(scores, np.array([1, 2])).tolist() == [1.5, 2.5]
        and target_ranks(scores, np.array([3, 0]))[0] == 4
    )
    ranked = -np.arange(12.0) * np.ones((3, 1))
    assert target_gains(ranked, np.array([0, 2, 10])).tolist() == [1.0, 0.5, 0.0]
    assert top_lists(scores[:1], 3)[0, 2] == 0 and exposure(np.array([[0, 1], [0, 2]]), 4).tolist() == [
        2,
        1,
        1,
        0,
    ]
    betas, partial, r2 = least_squares(np.stack([x, y], axis=1), 2 * x - 3)
    assert (
        betas[0] == pytest.approx(1)
        and abs(betas[1]) < 1e-9
        and r2 == pytest.approx(1)
        and partial[0] == pytest.approx(1)
    )


def test_bootstrap_intervals_hold_the_true_mean_in_most_samples():
    rng = np.random.default_rng(11)
    held = [not bootstrap(rng.normal(size=40), num=200, seed=s).spans_null for s in range(100)]
    assert 0.0 <= np.mean(held) <= 0.13
