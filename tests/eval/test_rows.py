"""Evaluation of rows of prompt and completion: exact losses, metrics by hand, audit, restart, comparison."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.compare.__main__ import compare_folders
from eval.compare.__main__ import main as compare
from eval.intervals import interval, resample
from eval.metrics.calibration import TEMPERATURES
from eval.rows import sensitivity
from eval.rows.inputs import build_row_inputs
from eval.rows.measure import floors_of, measure
from eval.rows.metrics import slices, statistics
from eval.rows.pipeline import evaluate_rows
from eval.rows.predict import describe_all, judge
from eval.rows.scoring import RowScorer
from eval.rows.subject import load_rows
from eval.run import main as evaluate
from gdrt_ds.errors import UserError
from gdrt_ds.inference.recommender import open_run
from gdrt_ds.runtime import Runtime
from tests.data.sft_files import write_lines, write_splits
from tests.eval.run_folders import make_run

LABELS = ["groups.by=label", "groups.num=3", "model.dtype=float32"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    data = write_splits(folder / "data", (48, 8, 30))
    return make_run(folder / "run", [f"data.path={data}", *LABELS])


@pytest.fixture(scope="module")
def subject(run):
    return load_rows(Runtime(), run=str(run), overrides=LABELS)


@pytest.fixture(scope="module")
def evaluated(run, subject):
    evaluate_rows(subject, Runtime(), num_bootstrap=200, audits=["sensitivity"])
    return run / "eval" / "test-full"


@torch.no_grad()
def plain_losses(subject, encoded, temperature=1.0):
    row = torch.from_numpy(encoded.input_ids.astype(np.int64))
    logits = subject.model.loaded.model(input_ids=row[None, :-1]).logits[0, -encoded.num_target :]
    logits = logits.double() / temperature
    return torch.nn.functional.cross_entropy(logits, row[-encoded.num_target :], reduction="none").numpy()


# -- scores
def test_losses_at_every_temperature_are_those_of_the_plain_model(subject):
    encoded = [subject.model.encoder.encode(row) for row in subject.rows[:5]]
    for one, scored in zip(encoded, RowScorer(subject.model).score(encoded, True), strict=True):
        np.testing.assert_allclose(scored.losses, plain_losses(subject, one), atol=1e-4)
        for place in (0, 13, 16, 40, 64):
            plain = plain_losses(subject, one, TEMPERATURES[place])
            np.testing.assert_allclose(scored.curves[:, place], plain, atol=1e-4)


def test_listed_answers_are_scored_whole_and_the_highest_is_the_prediction(subject):
    rows = subject.rows[:4]
    for row, found in zip(rows, describe_all(subject, RowScorer(subject.model), rows), strict=True):
        texts = [subject.model.encoder.encode(row, completion=choice) for choice in row.choices]
        scores = np.array([-plain_losses(subject, one).sum() for one in texts])
        np.testing.assert_allclose(found["choice_scores"], scores, atol=1e-3)
        assert found["correct"] == float(scores.argmax() == row.answer)
        own = scores[row.answer] - np.logaddexp(*scores)
        assert found["choice_nll"] == pytest.approx(-own, abs=1e-3)
        assert found["target_nll"] == pytest.approx(-scores[row.answer], abs=1e-3)


def test_equal_scores_share_the_hit_and_scores_that_are_no_numbers_miss():
    assert judge(("a", "b", "c"), 1, np.array([-1.0, -1.0, -3.0]))["correct"] == 0.5
    assert judge(("a", "b"), 1, np.array([-1.0, float("nan")]))["correct"] == 0.0


def test_every_target_token_keeps_the_group_of_its_span(subject):
    assert subject.group_names == ["(outside)", "answer", "reason"]
    row = subject.rows[0]
    groups = subject.groups[row.sample_id].tolist()
    assert [subject.group_names[g] for g in groups] == ["answer"] + ["reason"] * (len(groups) - 2) + [
        "(outside)"
    ]


def test_a_label_that_train_lacks_is_a_group_of_its_own(run, tmp_path):
    data = write_splits(tmp_path / "data", (48, 8, 30))
    test = [json.loads(line) for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    test[0]["group"][1]["label"] = "afterthought"
    write_lines(data / "test.jsonl", test)
    found = load_rows(Runtime(), run=str(run), overrides=[*LABELS, f"data.path={data}"])
    assert found.group_names == ["(outside)", "answer", "reason", "(not in train)"]
    names = [found.group_names[group] for group in found.groups[found.rows[0].sample_id]]
    assert names == ["answer"] + ["(not in train)"] * (len(names) - 2) + ["(outside)"]


# -- metrics
def prediction(place, group_losses, correct, kind):
    """A row whose groups have the given losses, one list of token losses for each group."""
    groups = {
        str(g): {
            "tokens": len(losses),
            "nll": sum(losses),
            "nll_at_temperatures": (sum(losses) / np.sqrt(TEMPERATURES)).tolist(),
        }
        for g, losses in enumerate(group_losses)
        if losses
    }
    return {
        "sample_id": place,
        "user_id": f"u{place}",
        "target_id": str(place),
        "groups": groups,
        "labels": {"kind": kind},
        "correct": correct,
        "choice_nll": 0.5,
    }


def test_metrics_by_hand():
    rows = [
        prediction(0, [[1.0, 3.0], [5.0]], 1.0, "x"),
        prediction(1, [[2.0], []], 0.0, "y"),
        prediction(2, [[], [7.0, 6.0]], 0.5, "y"),
    ]
    found, _ = statistics(build_row_inputs(rows, ["first", "second"]))
    value = {name: one.finish(one.features.sum(0, keepdims=True))[0] for name, one in found.items()}
    assert value["nll"] == pytest.approx(24 / 6) and value["accuracy"] == pytest.approx(0.5)
    assert value["nll_worst_group"] == pytest.approx(6) and value["nll_gap_group"] == pytest.approx(4)
    assert value["nll_calibrated"] == pytest.approx(24 / 6 / 8)  # lowest at T = 64, where it is nll / 8
    assert value["temperature"] == pytest.approx(64)
    ends = interval(resample(found, np.arange(3), 50)["temperature"])
    assert np.isnan(ends).all()  # an end of the range: that or beyond
    assert value["nll_calibrated_worst_group"] == pytest.approx(6 / 8)


def test_rows_whose_choices_have_no_finite_score_are_told(subject):
    rows = [prediction(n, [[1.0 + n]], 1.0, "x") for n in range(4)]
    rows[1] |= judge(("a", "b"), 1, np.array([-1.0, float("nan")]))
    found = measure(subject, rows, floors=False, num_bootstrap=20)
    assert found["metrics"]["accuracy"]["value"] == 0.75 and found["metrics"]["choice_nll"]["n"] == 3
    assert any(note.startswith("1 of 4 rows have choices whose scores are not") for note in found["notes"])


def test_breakdowns_are_by_token_group_and_by_column():
    rows = [prediction(n, [[1.0], [2.0 + n % 2]], float(n % 2), "xy"[n % 2]) for n in range(40)]
    found = slices(build_row_inputs(rows, ["first", "second"]))
    assert set(found) == {"token_group", "label:kind"}
    one = found["label:kind"]["groups"]["y"]["accuracy"]
    assert one.finish(one.features.sum(0, keepdims=True))[0] == 1.0 and one.n == 20
    gap = found["token_group"]["summary"]["nll"]["gap"]
    assert gap.finish(gap.features.sum(0, keepdims=True))[0] == pytest.approx(1.5)


def test_a_slice_in_which_every_row_is_right_has_room_below_it():
    rows = [prediction(n, [[1.0]], 1.0, "xy"[n % 2]) for n in range(24)]
    inputs = build_row_inputs(rows, [])
    one = slices(inputs)["label:kind"]["groups"]["y"]["accuracy"]
    found = resample({"accuracy": one}, inputs.user_of_sample, 100)["accuracy"]
    assert interval(found) == pytest.approx((0.025 ** (1 / 12), 1))


def test_a_slice_of_one_user_has_no_interval_of_its_loss():
    rows = [prediction(n, [[1.0 + n % 3]], float(n % 2), "x") for n in range(20)]
    rows += [{**prediction(20 + n, [[2.0 + n % 3]], 0.0, "y"), "user_id": "one"} for n in range(20)]
    inputs = build_row_inputs(rows, [])
    own = slices(inputs)["label:kind"]["groups"]
    measured = {(name, measure): own[name][measure] for name in "xy" for measure in ("nll", "accuracy")}
    found = resample(measured, inputs.user_of_sample, 100)
    assert {key: one.units for key, one in found.items() if key[1] == "nll"} == {
        ("x", "nll"): 20,
        ("y", "nll"): 1,
    }
    assert np.isnan(interval(found["y", "nll"])).all() and np.isfinite(interval(found["x", "nll"])).all()
    assert interval(found["y", "accuracy"]) == pytest.approx((0, 0.975)), "one user without a hit"


def test_a_floor_that_is_always_right_has_room_below_it():
    inputs = build_row_inputs([prediction(n, [[1.0]], 1.0, "x") for n in range(24)], [])
    rows = [SimpleNamespace(choices=("yes", "no"), answer=0)] * 24
    subject = SimpleNamespace(rows=rows, train_completions=lambda: Counter(yes=5))
    found = floors_of(subject, inputs, 100)["majority"]["accuracy"]
    assert (found["value"], found["ci_high"]) == (1, 1)
    assert found["ci_low"] == pytest.approx(0.025 ** (1 / 24))


def test_rows_without_a_finite_loss_are_counted_and_left_out():
    rows = [prediction(n, [[1.0]], 1.0, "x") for n in range(3)]
    rows[1]["groups"]["0"]["nll"] = None
    inputs = build_row_inputs(json.loads(json.dumps(rows)), [])
    assert inputs.notes == ("1 of 3 rows have no finite loss; figures are over the others",)
    found, _ = statistics(inputs)
    assert found["nll"].n == 2


# -- the folder
def test_an_evaluation_folder_has_results_predictions_and_a_report(evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    for name in ("nll", "nll_calibrated", "accuracy", "choice_nll", "nll_worst_group", "nll_gap_group"):
        figure = results["metrics"][name]
        assert figure["ci_low"] <= figure["value"] <= figure["ci_high"] and figure["n"] == 30
    assert results["kind"] == "rows" and set(results["floors"]) == {"majority", "chance"}
    assert results["floors"]["chance"]["accuracy"]["value"] == 0.5
    groups = results["breakdowns"]["token_group"]["groups"]
    worst = max(values["nll"]["value"] for values in groups.values())
    assert results["metrics"]["nll_worst_group"]["value"] == pytest.approx(worst)
    lines = (evaluated / "predictions.jsonl").read_text().splitlines()
    total = sum(json.loads(line)["target_nll"] for line in lines)
    tokens = sum(json.loads(line)["num_tokens"] for line in lines)
    assert len(lines) == 30 and results["metrics"]["nll"]["value"] == pytest.approx(total / tokens)
    page = (evaluated / "report.html").read_text()
    assert "Evidence" in page and "group of the target token" in page


def test_the_report_of_a_base_model_of_rows_has_no_training_curves(run, tmp_path):
    trained = tmp_path / "run"
    shutil.copytree(run, trained)
    log = "".join(json.dumps({"step": step, "loss": 3.0 - step}) + "\n" for step in (1, 2))
    (trained / "metrics.jsonl").write_text(log)
    for base in (False, True):
        subject = load_rows(Runtime(), run=str(trained), base=base, limit=4, overrides=LABELS)
        evaluate_rows(subject, Runtime(), output=tmp_path / str(base), num_bootstrap=20)
        report = (tmp_path / str(base) / "report.md").read_text(encoding="utf-8")
        assert ("## Training" in report) is not base


def test_a_restart_scores_what_is_missing_and_gives_the_same(run, subject, tmp_path):
    whole = evaluate_rows(subject, Runtime(), output=tmp_path / "a", num_bootstrap=100)
    part = tmp_path / "a" / "parts" / "rank_0.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    (tmp_path / "b" / "parts").mkdir(parents=True)
    (tmp_path / "b" / "parts" / "rank_0.jsonl").write_text("".join(lines[:11]) + lines[11][:50])
    again = evaluate_rows(subject, Runtime(), output=tmp_path / "b", num_bootstrap=100)
    assert again["metrics"] == whole["metrics"]
    assert len((tmp_path / "b" / "parts" / "rank_0.jsonl").read_text().splitlines()) == 31


def test_two_evaluations_are_compared_and_other_rows_are_refused(run, evaluated, tmp_path, capsys):
    evaluate(["--run", str(run), "--base", "--output", str(tmp_path / "base"), "--bootstrap", "100", *LABELS])
    status = compare(
        [str(evaluated), str(tmp_path / "base"), "--output", str(tmp_path / "out"), "--num-bootstrap", "100"]
    )
    assert status == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["primary_family"] == [
        "nll",
        "nll_calibrated",
        "accuracy",
        "nll_worst_group",
        "nll_gap_group",
    ]
    assert (tmp_path / "out" / "compare.html").is_file()
    evaluate(
        [
            "--run",
            str(run),
            "--limit",
            "20",
            "--output",
            str(tmp_path / "less"),
            "--bootstrap",
            "100",
            *LABELS,
        ]
    )
    with pytest.raises(UserError, match="have different test rows"):
        compare_folders([evaluated, tmp_path / "less"], 100, 0)


# -- refusals
def test_what_needs_a_catalogue_is_refused(run, capsys):
    for given, text in (
        (["--audit", "position"], "--audit position: it is about lists or histories of a catalogue"),
        (["--audit", "sensitivty"], "there is no such audit"),
        (["--mode", "beam"], "--mode beam: it searches a catalogue"),
        (["--floors", "markov"], "rows of prompt and completion have the floors majority and chance"),
    ):
        with pytest.raises(SystemExit) as ended:
            evaluate(["--run", str(run), *given])
        assert ended.value.code == 2 and text in capsys.readouterr().err
    with pytest.raises(UserError, match="was trained on rows of prompt and completion"):
        open_run(run, Runtime())


# -- the audit
def test_the_audit_speaks_where_evidence_is_read_and_is_silent_where_it_is_not():
    generator = np.random.default_rng(0)
    true = generator.gamma(2, 1, 60)
    names = (
        sensitivity.TRUE,
        sensitivity.ABLATED,
        sensitivity.SWAPPED,
        sensitivity.BLANK,
        sensitivity.SECOND,
    )
    noise = {name: true + generator.normal(0, 0.1, 60) for name in names}
    blind = sensitivity.measure({**noise, sensitivity.TRUE: true}, 400, 0)
    paid = {name: values + (2.0 if name != sensitivity.TRUE else 0.0) for name, values in noise.items()}
    reads = sensitivity.measure({**paid, sensitivity.TRUE: true}, 400, 0)
    key = f"{sensitivity.ABLATED} - true"
    assert sensitivity.verdict(reads[key]) == "the evidence is read"
    assert sensitivity.verdict(blind[key]) == "no use of the evidence is shown"
    assert reads[sensitivity.CONTROL].spans_null


def test_swapped_prompts_are_other_rows_prompts(subject):
    rows = sensitivity.one_row_per_user(subject.rows, 20)
    assert len(rows) == 20
    found = sensitivity.variants(subject, rows)
    assert all(a != b for a, b in zip(found[sensitivity.TRUE], found[sensitivity.SWAPPED], strict=True))
    assert found[sensitivity.BLANK] == [""] * 20
    assert found[sensitivity.ABLATED][0] == rows[0].auxiliary


def test_all_leaves_the_audit_of_one_user_out_and_its_name_is_refused(run, tmp_path, capsys):
    few = ["--run", str(run), "--limit", "1", "--bootstrap", "20", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        evaluate([*few, "--audit", "sensitivity"])
    assert "raise --limit (it is 1)" in capsys.readouterr().err and not (tmp_path / "out").exists()
    evaluate([*few, "--audit", "all"])
    assert "left out of `all`: --audit sensitivity: 1 user(s)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["audits"] == {}
