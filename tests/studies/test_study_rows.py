"""A study on rows of prompt and completion: its page says what the evaluations of its cells measured."""

from __future__ import annotations

import json

import pytest

from eval.rows.pipeline import evaluate_rows
from eval.rows.subject import load_rows
from eval.study.__main__ import main as eval_study
from gdrt_ds.runtime import Runtime
from gdrt_ds.studies.grid import load_study
from tests.data.sft_files import write_splits
from tests.eval.run_folders import make_run

ROWS = {"sft": 0, "gdrt": 1}  # row -> seed of its adapter, which nothing trained


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with two cells; `kind` is a column of the rows."""
    folder = tmp_path_factory.mktemp("study")
    data = write_splits(folder / "data", (48, 8, 30))
    cells = []
    for row, seed in ROWS.items():
        run = make_run(folder / "runs" / row, [f"data.path={data}", "model.dtype=float32"], seed=seed)
        evaluate_rows(load_rows(Runtime(), run=str(run)), Runtime(), num_bootstrap=50)
        summary = {"world": 1, "train_seconds": 1.0, "device": "cpu", "git_hash": "", "status": "completed"}
        (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        cells.append(
            {
                "name": row,
                "row": row,
                "setting": "default",
                "seed": 0,
                "run": f"runs/{row}",
                "evaluation": f"runs/{row}/eval/test-full",
            }
        )
    grid = {
        "study": {
            "name": "rows",
            "question": "A question.",
            "baseline": "sft",
            "controls": [],
            "label": ["kind"],
            "rows": {"sft": [], "gdrt": []},
            "settings": {"default": {}},
        },
        "cells": cells,
    }
    (folder / "grid.json").write_text(json.dumps(grid), encoding="utf-8")
    eval_study([str(folder)])
    return folder


def test_the_worst_value_of_a_label_is_that_of_the_evaluation(study):
    found = json.loads((study / "study.json").read_text(encoding="utf-8"))["settings"]["default"]
    for row in ROWS:
        results = json.loads((study / "runs" / row / "eval" / "test-full" / "results.json").read_text())
        shown = found["rows"][row]
        assert shown["accuracy"]["value"] == pytest.approx(results["metrics"]["accuracy"]["value"])
        by_kind = results["breakdowns"]["label:kind"]
        worst = by_kind["summary"]["accuracy"]["worst"]["value"]
        assert shown["accuracy worst kind"]["value"] == pytest.approx(worst)
        assert shown["nll worst kind"]["value"] == pytest.approx(by_kind["summary"]["nll"]["worst"]["value"])
        for kind, measures in by_kind["groups"].items():
            assert shown[f"nll kind={kind}"]["value"] == pytest.approx(measures["nll"]["value"])
    compared = found["differences"]["sft"]["gdrt"]
    assert compared["accuracy worst kind"]["family"] and compared["accuracy worst kind"]["verdict"]


def test_the_page_speaks_of_rows_and_not_of_a_catalogue(study):
    page = (study / "study.md").read_text(encoding="utf-8")
    assert "none: rows of prompt and completion" in page
    assert "Accuracy, worst kind" in page and "relevance group" not in page


def test_labels_of_a_study_file_are_one_or_several(tmp_path):
    text = "name: a\nconfig: configs/smoke.yaml\nseeds: [0]\nbaseline: x\nrows: {x: []}\n"
    for given, read in (("", []), ("label: kind\n", ["kind"]), ("label: [kind, topic]\n", ["kind", "topic"])):
        file = tmp_path / "study.yaml"
        file.write_text(text + given, encoding="utf-8")
        assert load_study(file).label == read
