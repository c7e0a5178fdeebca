"""The audit `history_length` on scores whose dependence on the length is known, and on planted models."""

import numpy as np
import pytest
from planted_context import HONEST_DATA, PlantedContext
from run_folders import make_run
from scipy.special import log_softmax

from eval.audit import AuditOptions, run_audits
from eval.audit.estimates import Estimate
from eval.audit.model.history_length import CONTROL, EFFECT, in_words, lengths_of, measure
from eval.loading import load_subject
from eval.report import figures
from gdrt_ds.data.corpus import Sample
from gdrt_ds.runtime import Runtime

OPTIONS = AuditOptions(users=40, num_bootstrap=200)


def rows(strengths: dict[str, float], users: int = 200, items: int = 30, seed: int = 0):
    """(scores [U, I] by length, targets [U]): the target gets `strength` nats more than noise."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(items, size=users)
    noise = rng.normal(size=(users, items))
    onehot = np.eye(items)[targets]
    return {k: log_softmax(noise + s * onehot, axis=1) for k, s in strengths.items()}, targets


def other_nll(seed: int, users: int = 200) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"1": rng.normal(3, 1, users), "all": rng.normal(3, 1, users)}


def test_figures_by_length_equal_a_loop_over_users():
    scores, targets = rows({"1": 0.5, "2": 1.0, "all": 2.0}, users=20)
    found = measure(scores, targets, other_nll(0, 20), 50)
    for length, name in (("1", "last 1"), ("2", "last 2"), ("all", "all")):
        nll = [-scores[length][u, t] for u, t in enumerate(targets)]
        ranks = [1 + (scores[length][u] > scores[length][u, t]).sum() for u, t in enumerate(targets)]
        gains = [1 / np.log2(rank + 1) if rank <= 10 else 0.0 for rank in ranks]
        assert found[f"NLL, {name}"].value == pytest.approx(np.mean(nll))
        assert found[f"NDCG@10, {name}"].value == pytest.approx(np.mean(gains))
    assert found[EFFECT].value == pytest.approx(found["NLL, last 1"].value - found["NLL, all"].value)


def test_older_items_that_tell_something_are_seen_and_such_that_tell_nothing_are_not():
    scores, targets = rows({"1": 0.5, "5": 1.0, "all": 2.0})
    found = measure(scores, targets, other_nll(1), 200)
    assert found[EFFECT].low > found["NLL, last 5 - all"].low > 0
    assert found["NDCG@10, last 1 - all"].high < 0 and found[CONTROL].spans_null
    same = {k: scores["all"] for k in scores}
    assert measure(same, targets, other_nll(1), 200)[EFFECT].value == 0


def test_an_effect_is_worded_by_its_sign():
    assert in_words(Estimate(0.2, 0.1, 0.3, 9)) == "higher by 0.2 [0.1, 0.3]"
    assert in_words(Estimate(-0.2, -0.3, -0.1, 9)) == "lower by 0.2 [0.1, 0.3]"
    assert in_words(Estimate(-0.2, -0.3, 0.1, 9)) == "lower by 0.2 [-0.1, 0.3] (the interval spans 0)"


def test_lengths_shorten_at_least_one_history_and_exist_in_all():
    def samples(*lengths):
        return [Sample(n, f"u{n}", tuple("abcdefghijklmno"[:k]), "z") for n, k in enumerate(lengths)]

    assert lengths_of(samples(10, 10)) == [1, 2, 5]
    assert lengths_of(samples(10, 15)) == [1, 2, 5, 10]
    assert lengths_of(samples(4, 3)) == [1, 2]


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return load_subject(
        Runtime(), run=str(make_run(tmp_path_factory.mktemp("planted") / "run", [HONEST_DATA]))
    )


def test_a_model_that_reads_the_last_item_alone_makes_the_audit_speak(subject):
    found = run_audits(["history_length"], PlantedContext(subject, Runtime(), OPTIONS, "position", 40.0))
    audit = found["history_length"]
    assert audit["speaks"] and abs(audit["effect"]["value"]) < 1e-6
    assert [row[0] for row in audit["table"]["rows"]][-1] == "all" and len(audit["table"]["rows"]) > 2
    assert len(audit["figures"]) == 2 and all(figures.checked(drawn) for drawn in audit["figures"])
