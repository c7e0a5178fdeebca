"""The audit `information` on scorers whose knowledge is known, and on a real (tiny) model."""

import numpy as np
import pytest
from planted_context import HONEST_DATA, PlantedContext
from run_folders import make_run
from scipy.special import log_softmax

from eval.audit import AuditOptions, run_audits
from eval.audit.estimates import Estimate
from eval.audit.model.information import EFFECT, clean_pairs, measure, side_curves, sureness
from eval.audit.partners import partner_note
from eval.loading import load_subject
from eval.metrics.calibration import TEMPERATURES
from eval.report import figures
from gdrt_ds.data.corpus import Sample
from gdrt_ds.runtime import Runtime

OPTIONS = AuditOptions(users=40, num_bootstrap=200, permutations=3)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return load_subject(
        Runtime(), run=str(make_run(tmp_path_factory.mktemp("planted") / "run", [HONEST_DATA]))
    )


def drawn(users: int = 150, items: int = 60, through: float = 1.5, without: float = 1.0, seed: int = 0):
    """(log-probabilities [U, I], targets [U]) of a scorer that is right: it draws the targets."""
    rng = np.random.default_rng(seed)
    scores = log_softmax(without * rng.normal(size=items) + through * rng.normal(size=(users, items)), axis=1)
    return scores, np.array([rng.choice(items, p=np.exp(row)) for row in scores])


def of(scores, targets, num=200):
    return measure(*side_curves(scores, targets, ~np.eye(len(scores), dtype=bool)), scores.shape[1], num, 0)


def test_the_curves_equal_a_loop_over_pairs_and_temperatures():
    scores, targets = drawn(users=5, items=7)
    clean = np.array([[v not in (u, (u + 2) % 5) for v in range(5)] for u in range(5)])
    own, other, one = side_curves(scores, targets, clean)
    for t, temperature in enumerate(TEMPERATURES):
        for u in range(5):
            loss = [-log_softmax(scores[v] / temperature)[targets[u]] for v in range(5)]
            assert own[u, t] == pytest.approx(loss[u])
            assert other[u, t] == pytest.approx(np.mean([loss[v] for v in range(5) if clean[u, v]]))
            assert min(abs(one[u, t] - loss[v]) for v in range(5) if clean[u, v]) < 1e-9


def test_a_temperature_is_judged_by_its_interval():
    def told(low, high):
        return sureness(Estimate(2.5, low, high, 9, 1.0))

    assert told(1.5, 3.0) == "too sure" and told(0.2, 0.9) == "not sure enough"
    assert told(0.8, 6.0) == "not shown to be too sure or not sure enough"
    assert told(float("nan"), float("nan")) == "without an interval"


def test_a_right_scorer_knows_what_it_knows_and_the_parts_add_up():
    scores, targets = drawn(users=400)
    found = of(scores, targets)
    truth = np.log(60) - float(
        -(np.exp(scores) * scores).sum(axis=1).mean()
    )  # ln I minus the mean entropy of its own probabilities
    assert found["known about the target"].value == pytest.approx(truth, abs=0.12)
    assert found["temperature"].low < 1 < found["temperature"].high
    assert found[EFFECT].value + found["known without the history"].value == pytest.approx(
        found["known about the target"].value
    )
    assert found[EFFECT].low > 0.3 and found["known without the history"].low > 0.05
    assert found["control: one other user's history"].spans_null


@pytest.mark.parametrize("scale", [0.4, 3.0, 9.0])
def test_sharper_scores_know_no_more(scale):
    scores, targets = drawn()
    plain, scaled = of(scores, targets), of(log_softmax(scores * scale, axis=1), targets)
    for name in (EFFECT, "known about the target", "known without the history"):
        assert scaled[name].value == pytest.approx(plain[name].value, abs=2e-3)
    assert scaled["temperature"].value == pytest.approx(scale * plain["temperature"].value, rel=0.02)
    as_scored = "NLL as scored: other histories - own"
    assert (
        abs(scaled[as_scored].value - plain[as_scored].value) > 0.3
    )  # what `sensitivity` measures does move


def test_one_ranking_for_all_has_nothing_through_the_history_and_noise_knows_nothing():
    scores, targets = drawn(through=0.0, without=1.5)
    same = of(scores, targets)
    assert same[EFFECT].value == pytest.approx(0, abs=1e-9) and same["known without the history"].low > 0.3
    noise = of(np.random.default_rng(3).normal(size=scores.shape) * 5, targets)
    assert noise[EFFECT].spans_null and abs(noise["known about the target"].value) < 0.03


def test_partners_are_other_users_whose_history_lacks_the_target():
    def sample(n, user, history, target):
        return Sample(n, user, history, target)

    samples = [
        sample(0, "a", ("x", "y"), "z"),
        sample(1, "a", ("y",), "q"),
        sample(2, "b", ("z",), "q"),
        sample(3, "c", ("w",), "x"),
        sample(4, "d", ("x", "y"), "v"),
    ]
    found = clean_pairs(samples)
    assert found[0].tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]  # same user, itself, holds z, clean, the same history
    assert found[3].tolist() == [False, True, True, False, False]
    nobody = clean_pairs([sample(0, "a", ("x",), "y"), sample(1, "b", ("y",), "x")])
    assert nobody.tolist() == [[False, True], [True, False]]  # no clean partner: any other user
    holding = [sample(0, "a", ("x",), "y"), sample(1, "b", ("y",), "w"), sample(2, "c", ("y", "q"), "w")]
    assert partner_note(samples) == "" and partner_note(holding).startswith(" For 1 of 3 users every other ")


def test_what_was_not_measured_is_no_finding_that_nothing_is_there():
    nan = float("nan")
    assert not Estimate(nan, nan, nan, 9).not_above_null and not Estimate(0.2, nan, nan, 9).not_above_null
    assert Estimate(0.2, -0.1, 0.5, 9).not_above_null and not Estimate(0.2, 0.1, 0.3, 9).not_above_null


def test_it_speaks_when_the_history_is_not_read_and_draws_its_curves(subject):
    honest = run_audits(["information"], PlantedContext(subject, Runtime(), OPTIONS))["information"]
    assert (
        not honest["speaks"]
        and honest["effect"]["ci_low"] > 0
        and all(figures.checked(f) for f in honest["figures"])
    )

    class Deaf(PlantedContext):
        def score_batch(self, histories):
            return np.repeat(super().score_batch([self.users(1)[0].history]), len(histories), axis=0)

    deaf = run_audits(["information"], Deaf(subject, Runtime(), OPTIONS))["information"]
    assert deaf["speaks"] and deaf["effect"]["value"] == pytest.approx(0, abs=1e-9)


def test_a_real_model_is_scored_once_per_user_and_its_loss_is_the_evaluators(subject):
    context_options = AuditOptions(users=12, num_bootstrap=50)
    found = run_audits(["information"], subject, Runtime(), context_options)["information"]
    assert "12 exact catalogue scorings" in found["cost"] and found["effect"]["n"] == 12
    low = min(found["figures"][0]["series"][0]["y"])
    assert found["measures"]["calibrated NLL"]["value"] == pytest.approx(low, abs=2e-3)
