"""The floors of an evaluation: which are shown, what is said about those that are not, and a trained one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from eval.floors import choose, fit_floors, floor_predictions, minus_floors, sasrec
from eval.loading import load_subject
from eval.predictions import item_order
from eval.run import main
from gdrt_ds.errors import UserError
from gdrt_ds.runtime import Runtime
from tests.eval.run_folders import make_run

pytestmark = pytest.mark.slow

ALL = {"popularity", "markov", "sasrec"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("floors") / "run")


@pytest.fixture
def subject(run, tmp_path, monkeypatch):
    monkeypatch.setenv("GDRT_CACHE", str(tmp_path / "cache"))
    return load_subject(Runtime(), run=str(run))


def test_an_evaluation_shows_sasrec_beside_popularity_and_markov_and_loads_it_the_next_time(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("GDRT_CACHE", str(tmp_path / "cache"))
    arguments = ["--run", str(run), "--output", str(tmp_path / "out"), "--bootstrap", "20"]
    main([*arguments, "--floors", "sasrec,popularity,markov"])
    said = capsys.readouterr().out
    assert "sasrec: trained once for this data on cpu, 200 targets an epoch, about" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["floors"]) == ["popularity", "markov", "sasrec", "targets"]
    own, popular = results["floors"]["sasrec"], results["floors"]["popularity"]
    assert own.keys() == popular.keys() and {"ndcg@10", "nll", "nll_calibrated", "mgu@5"} < own.keys()
    assert own["nll"]["value"] < popular["nll"]["value"]  # a fifth of the targets follow from the last item
    for name in ALL:
        for metric in ("ndcg@10", "hr@10", "nll", "nll_calibrated"):
            difference = results["minus_floors"][name][metric]
            both = results["metrics"][metric]["value"], results["floors"][name][metric]["value"]
            assert difference["value"] == pytest.approx(both[0] - both[1])
            assert difference["ci_low"] <= difference["value"] <= difference["ci_high"]
    note = next(note for note in results["notes"] if note.startswith("floor sasrec: hidden "))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "minus markov" in report and note in report and "sasrec" in report.split(note)[0]
    assert "sasrec" in (tmp_path / "out" / "report.html").read_text()

    main([*arguments, "--floors", "auto"])
    assert "trained once" not in capsys.readouterr().out
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["floors"]["sasrec"] == own


def test_floors_that_have_seen_the_split_are_named(subject):
    choice = choose("popularity,markov", subject.corpus)
    assert not any("so that a model below" in note for note in fit_floors(subject, choice)[1])
    notes = fit_floors(replace(subject, split="train"), choice)[1]
    assert any(
        "(split train), so that a model below such a floor is not shown to be worse" in n for n in notes
    )


def test_the_difference_to_a_floor_pairs_users(subject):
    """Against the plain bootstrap over users, of the differences themselves."""
    fitted, _ = fit_floors(subject, choose("popularity,markov", subject.corpus))
    rows = {
        name: floor_predictions(subject, floor, item_order(subject), 10) for name, floor in fitted.items()
    }
    entries = subject.catalogue.entries
    same = minus_floors(rows["markov"], {"markov": rows["markov"]}, entries, 200)["markov"]
    assert {(row["value"], row["ci_low"], row["ci_high"]) for row in same.values()} == {(0.0, 0.0, 0.0)}
    found = minus_floors(rows["markov"], rows, entries, 2000)["popularity"]["nll"]
    pairs = zip(rows["markov"], rows["popularity"], strict=True)
    by_user: dict[str, list[float]] = {}
    for own, floor in pairs:
        by_user.setdefault(own["user_id"], []).append(own["target_nll"] - floor["target_nll"])
    sums, counts = (np.array([f(values) for values in by_user.values()]) for f in (sum, len))
    draws = np.random.default_rng(1).integers(0, len(sums), size=(4000, len(sums)))
    low, high = np.quantile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), [0.025, 0.975])
    assert found["value"] == pytest.approx(sums.sum() / counts.sum())
    assert found["ci_low"] == pytest.approx(low, abs=0.15 * (high - low))
    assert found["ci_high"] == pytest.approx(high, abs=0.15 * (high - low))


def test_probabilities_over_all_text_are_not_compared_with_those_of_floors(run, tmp_path):
    arguments = ["--run", str(run), "--limit", "10", "--bootstrap", "20", "--floors", "popularity"]
    main([*arguments, "--mode", "full", "--output", str(tmp_path / "full")])
    results = json.loads((tmp_path / "full" / "results.json").read_text())
    assert set(results["minus_floors"]["popularity"]) == {"ndcg@10", "hr@10", "nll_calibrated"}
    (note,) = [note for note in results["notes"] if "they are not compared" in note]
    report = (tmp_path / "full" / "report.md").read_text()
    assert note in report
    cards = {line.split(" | ")[0]: line for line in report.split("This run minus each floor")[0].splitlines()}
    assert "popularity" not in cards["| Target NLL"] and "popularity" in cards["| NLL, calibrated"]


def test_sasrec_is_left_out_where_nobody_asked_and_training_takes_long(subject, monkeypatch, capsys):
    monkeypatch.setattr(sasrec, "UNASKED_SECONDS", 0)
    fitted, notes = fit_floors(subject, choose("auto", subject.corpus))
    assert set(fitted) == {"popularity", "markov"}
    assert len(notes) == 1 and notes[0].startswith("floor sasrec is left out: training takes about")
    assert "--floors popularity,markov,sasrec" in notes[0] and notes[0] in capsys.readouterr().out


def test_the_floors_rows_follow_the_rules_of_every_prediction(subject):
    subject.samples = subject.samples[:5]
    fitted, _ = fit_floors(subject, choose("auto", subject.corpus))
    assert set(fitted) == ALL
    for floor in fitted.values():
        scores = floor.log_probs([sample.history for sample in subject.samples])
        assert np.allclose(np.exp(scores).sum(axis=1), 1.0, atol=1e-9)
        for row, sample, own in zip(
            floor_predictions(subject, floor, item_order(subject), 50), subject.samples, scores, strict=True
        ):
            target = own[subject.catalogue.index_of[sample.target]]
            tied = int((np.abs(own - target) <= 1e-9).sum())
            assert row["rank"] == 1 + (own > target + 1e-9).sum() + (tied - 1) / 2 and row["num_tied"] == tied
            assert row["target_nll"] == pytest.approx(-target)


def test_floors_are_named_and_wrong_names_are_answered_before_the_scoring(run, subject, tmp_path, capsys):
    corpus = subject.corpus
    assert list(choose("markov, popularity", corpus)) == ["popularity", "markov"]
    assert choose("none", corpus) == {} and set(choose("auto", corpus)) == ALL
    with pytest.raises(SystemExit):
        main(["--run", str(run), "--output", str(tmp_path / "out"), "--floors", "markow"])
    said = capsys.readouterr().err
    assert "there is no floor markow" in said and "markov" in said and not (tmp_path / "out").exists()


def test_data_without_a_valid_split_have_no_sasrec(subject):
    subject.corpus.splits["valid"] = []
    with pytest.raises(UserError, match="the valid split is empty"):
        choose("sasrec", subject.corpus)
    fitted, notes = fit_floors(subject, choose("auto", subject.corpus))
    assert set(fitted) == {"popularity", "markov"} and "the valid split is empty" in notes[0]
