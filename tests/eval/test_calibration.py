"""The calibrated NLL against scipy's minimiser, under flatter scores, and of scorers whose truth is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp

sys.path.insert(0, str(Path(__file__).parent))
from examples import entry, prediction, world

from eval.metrics import evaluate
from eval.metrics.calibration import TEMPERATURES, log_sums, nll_curve

NAMES = ("nll_calibrated", "temperature", "nll_calibrated_worst_relevance_group")


def with_curves(predictions: list[dict], scores: np.ndarray) -> list[dict]:
    targets = [int(p["target_id"][1:]) for p in predictions]
    return [
        {**p, "nll_at_temperatures": nll_curve(row, t).tolist(), "target_nll": -float(log_softmax(row)[t])}
        for p, row, t in zip(predictions, scores, targets)
    ]


def figures(predictions: list[dict], entries: list, scores: np.ndarray) -> dict[str, float]:
    found = evaluate(with_curves(predictions, scores), entries, num_bootstrap=200, breakdowns=False)[
        "metrics"
    ]
    return {name: found[name] for name in ("nll", *NAMES) if name in found}


def losses(scores: np.ndarray, targets: list[int], temperature: float) -> np.ndarray:
    return -log_softmax(scores / temperature, axis=1)[np.arange(len(targets)), targets]


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0, 7.3])
def test_it_is_what_a_minimiser_over_temperature_finds(scale):
    predictions, entries, scores = world(skill=1.0)
    scores, targets = scores * scale, [int(p["target_id"][1:]) for p in predictions]
    best = minimize_scalar(
        lambda x: losses(scores, targets, np.exp(x)).mean(),
        bounds=(-3, 5),
        method="bounded",
        options={"xatol": 1e-9},
    )
    found = figures(predictions, entries, scores)
    assert found["nll_calibrated"]["value"] == pytest.approx(best.fun, abs=1e-3)
    assert found["temperature"]["value"] == pytest.approx(np.exp(best.x), rel=0.02)
    own = losses(scores, targets, np.exp(best.x))
    worst = max(own[[p["relevance_group"] == g for p in predictions]].mean() for g in range(4))
    assert found["nll_calibrated_worst_relevance_group"]["value"] == pytest.approx(worst, abs=2e-3)


def test_flatter_scores_lower_the_nll_and_leave_the_calibrated_one_alone():
    predictions, entries, scores = world(skill=1.0)
    sure, flat = figures(predictions, entries, scores * 6), figures(predictions, entries, scores * 2)
    assert flat["nll"]["value"] < sure["nll"]["value"] - 1
    for name in ("nll_calibrated", "nll_calibrated_worst_relevance_group"):
        assert flat[name]["value"] == pytest.approx(sure[name]["value"], abs=2e-3)
        assert flat[name]["ci_low"] == pytest.approx(sure[name]["ci_low"], abs=5e-3)
    assert sure["temperature"]["value"] == pytest.approx(3 * flat["temperature"]["value"], rel=0.02)


def test_a_scorer_that_is_right_has_temperature_one_and_one_that_knows_nothing_has_ln_of_the_catalogue():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2000, 50)) * 2
    chance = np.exp(log_softmax(scores, axis=1))
    entries = [entry(f"i{i}", 1) for i in range(50)]
    predictions = [prediction(n, f"i{rng.choice(50, p=row)}", 1, ["i0"]) for n, row in enumerate(chance)]
    honest = figures(predictions, entries, scores)
    assert honest["temperature"]["ci_low"] < 1 < honest["temperature"]["ci_high"]
    assert honest["nll_calibrated"]["value"] == pytest.approx(honest["nll"]["value"], abs=2e-3)
    blind = figures(predictions, entries, rng.normal(size=scores.shape) * 5)
    assert blind["nll"]["value"] > np.log(50) + 4 and blind["nll_calibrated"]["value"] == pytest.approx(
        np.log(50), abs=0.02
    )
    assert blind["temperature"]["value"] > 20


def test_a_temperature_at_an_end_of_its_range_has_no_interval():
    predictions, entries, scores = world(num_samples=60)
    found = figures(predictions, entries, -30 * scores)["temperature"]
    assert found["value"] == 64 and found["ci_low"] is None and found["ci_high"] is None
    inside = figures(predictions, entries, scores)["temperature"]
    assert inside["ci_low"] < inside["value"] < inside["ci_high"]


def test_sums_by_squaring_equal_logsumexp_at_every_temperature():
    scores = np.random.default_rng(0).normal(size=500) * 30 - 40
    expected = logsumexp(scores[None] / TEMPERATURES[:, None], axis=1)
    assert np.allclose(log_sums(scores), expected, rtol=1e-12, atol=1e-12)
    assert (
        TEMPERATURES[0] == 0.25 and TEMPERATURES[-1] == 64 and np.isneginf(log_sums(np.full(3, np.nan))).all()
    )


def test_impossible_items_and_nan_scores():
    scores = np.log(
        np.array([0.5, 0.25, 0.25, 0.0]), where=[True, True, True, False], out=np.full(4, -np.inf)
    )
    curve = nll_curve(scores, 0)
    assert curve[TEMPERATURES == 1] == pytest.approx(np.log(2)) and curve[-1] == pytest.approx(
        np.log(3), abs=0.02
    )
    assert np.isinf(nll_curve(scores, 3)).all()
    scores[1] = np.nan
    assert (
        nll_curve(scores, 0)[TEMPERATURES == 1] == pytest.approx(-np.log(2 / 3))
        and np.isnan(nll_curve(scores, 1)).all()
    )


def test_without_scores_of_the_whole_catalogue_it_is_not_defined_and_a_note_says_so():
    predictions, entries, scores = world(num_samples=40)
    found = evaluate(predictions, entries, num_bootstrap=20, breakdowns=False)
    assert (
        not set(NAMES) & set(found["metrics"])
        and "nll_calibrated: not defined on this data" in found["notes"]
    )
    some = with_curves(predictions, scores)
    some[3]["nll_at_temperatures"] = [None] * TEMPERATURES.size
    some[4]["nll_at_temperatures"] = None
    assert evaluate(some, entries, num_bootstrap=20, breakdowns=False)["metrics"]["nll_calibrated"]["n"] == 38
