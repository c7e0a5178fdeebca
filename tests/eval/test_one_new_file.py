"""A new metric and a new audit are one file each: the docs' examples are found, run, and reported."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from examples import entry, prediction
from run_folders import make_run

from eval import metrics
from eval.audit import audits
from eval.metrics import evaluate, evaluate_targets
from eval.run import main as evaluate_run
from tests.rooms import EXAMPLES, room_with


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("new") / "run")


def results_and_pages(run: Path, output: Path, *more: str) -> tuple[dict, str, str]:
    evaluate_run(["--run", str(run), "--limit", "12", "--bootstrap", "20", "--output", str(output), *more])
    results = json.loads((output / "results.json").read_text())
    return results, (output / "report.html").read_text(), (output / "report.md").read_text()


def test_a_metric_is_one_new_file(run, tmp_path):
    name = "rare_share@5"
    with room_with("eval.metrics", EXAMPLES / "metrics"):
        assert metrics.row_of(name).meaning == "share of the list in the less popular half"
        results, page, text = results_and_pages(run, tmp_path, "--no-floors")
        # Three of five items are popular; the list holds four popular ones and one rare one.
        entries = [entry(f"i{i}", count) for i, count in enumerate((9, 8, 7, 1, 0))]
        predictions = [prediction(0, "i4", 5, ["i0", "i1", "i2", "i3", "i4"])]
        found = evaluate(predictions, entries, ks=(5,), num_bootstrap=20)["metrics"][name]
        of_targets = evaluate_targets(predictions, entries, ks=(5,), num_bootstrap=20)[name]
    assert 0 < results["metrics"][name]["value"] < 1 and results["floors"]["targets"][name]["n"] == 12
    assert "share of the list in the less popular half" in page
    assert "share of the list in the less popular half" in text
    assert found["value"] == pytest.approx(3 / 5) and of_targets["value"] == 1.0
    assert metrics.row_of(name) is None, "the file is gone, the metric is not"


def test_an_audit_is_one_new_file(run, tmp_path, capsys):
    with room_with("eval.audit.model", EXAMPLES / "audits"):
        known = list(audits())
        more = ("--no-floors", "--audit", "repetition", "--audit-users", "12")
        results, page, text = results_and_pages(run, tmp_path, *more)
    assert known.index("shift") < known.index("repetition") < known.index("cross_tuning")
    found = results["audits"]["repetition"]
    # The evaluation had scored all users already and handed their scores over.
    assert "audit repetition: no model passes" in capsys.readouterr().out
    assert found["title"] == "Repetition" and found["effect"]["n"] == 12
    assert found["table"]["rows"][0][1] == found["measures"]["own items"]["value"] > 0
    for shown in (page, text):
        assert "Does the model recommend what the user already has?" in shown and "Audit: Repetition" in shown
    assert "Items of the history in the list" in page
    assert "repetition" not in audits(), "the file is gone, the audit is not"


def test_the_example_audit_finds_lists_that_repeat_the_history_and_not_those_of_others():
    import numpy as np

    with room_with("eval.audit.model", EXAMPLES / "audits"):
        measure = importlib.import_module("eval.audit.model.repetition").measure
    rng = np.random.default_rng(0)
    seen = rng.random((60, 40)) < 0.1
    repeating = np.argsort(-(seen + 0.1 * rng.random((60, 40))), axis=1)[:, :4]
    assert measure(repeating, seen)["own - another user's"].low > 0.3
    drawn = rng.permuted(np.tile(np.arange(40), (60, 1)), axis=1)[:, :4]
    assert measure(drawn, seen)["own - another user's"].spans_null
