"""What a study's page says: sentences about gains, figures of audits, intervals over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from eval.intervals import Resampled, interval
from eval.intervals.interval import total_error
from eval.report import write_catalogue
from eval.report.figures import checked
from eval.study.__main__ import write_study
from eval.study.beside_floors import BesideFloor, beside_floors
from eval.study.blocks import AUDITED
from eval.study.figures import study_figures
from eval.study.page import AUDITS_EXPLAINED, _against_floors, audits_section, sentence
from eval.study.seeds import combine, t_interval
from tests.eval.examples import world


def study_folder(folder: Path, evaluated: list[tuple[str, int]], floors: dict[int, float]) -> Path:
    """A study of sft and gdrt over the seeds 0 and 1, of which these cells are evaluated.

    Args:
        floors: seed -> NDCG@10 of the popularity floor over that seed's test users.
    """
    cells = []
    for row in ("sft", "gdrt"):
        for seed in (0, 1):
            run = f"runs/{row}-seed{seed}"
            cell = {"name": f"{row}-seed{seed}", "row": row, "setting": "default", "seed": seed, "run": run}
            cells.append({**cell, "evaluation": f"{run}/eval/test-renormalised"})
            if (row, seed) not in evaluated:
                continue
            predictions, entries, _ = world(60, 30, skill=1.0 if row == "sft" else 2.0, seed=seed, length=10)
            evaluation = folder / run / "eval" / "test-renormalised"
            evaluation.mkdir(parents=True)
            results = {"format": 2, "metrics": {}, "scoring": "renormalised", "mode": "renormalised"}
            if seed in floors:
                results["floors"] = {"popularity": {"ndcg@10": {"value": floors[seed]}}}
            (evaluation / "results.json").write_text(json.dumps(results))
            lines = [json.dumps(prediction) + "\n" for prediction in predictions]
            (evaluation / "predictions.jsonl").write_text("".join(lines))
            write_catalogue(evaluation / "catalogue.jsonl", entries)
            (folder / run / "summary.json").write_text("{}")
    study = {"name": "two", "question": "A question.", "baseline": "sft", "controls": [], "label": []}
    study |= {"rows": {"sft": [], "gdrt": []}, "settings": {"default": {}}}
    (folder / "grid.json").write_text(json.dumps({"study": study, "cells": cells}))
    return folder


@pytest.mark.parametrize(
    "evaluated, noted",
    [
        ([("gdrt", 0), ("gdrt", 1)], "no run of the baseline sft is evaluated yet; until then gdrt takes"),
        ([("sft", 0), ("gdrt", 1)], "without a run of sft of the same seed: gdrt 1"),
    ],
)
def test_a_row_that_shares_no_seed_with_the_baseline_is_said_to_wait_for_it(tmp_path, evaluated, noted):
    folder = study_folder(tmp_path, evaluated, floors={})
    summary = write_study(folder, num_bootstrap=50).sections[0].paragraphs
    waiting = "**gdrt**: no run of sft with the same seed is evaluated yet."
    assert summary == ["A question.", waiting]
    page = (folder / "study.md").read_text(encoding="utf-8")
    assert waiting in page and noted in page


ALL_CELLS = [("sft", 0), ("sft", 1), ("gdrt", 0), ("gdrt", 1)]


@pytest.mark.parametrize(
    "floors, expected, noted",
    [({0: 0.1, 1: 0.5}, 0.3, False), ({0: 0.1, 1: 0.1}, 0.1, False), ({1: 0.5}, 0.5, True)],
)
def test_a_floor_is_the_mean_over_the_seeds_as_the_rows_are(tmp_path, floors, expected, noted):
    folder = study_folder(tmp_path, ALL_CELLS, floors)
    write_study(folder, num_bootstrap=50)
    found = json.loads((folder / "study.json").read_text())["settings"]["default"]["floors"]
    assert found["popularity"]["ndcg@10"] == expected and found["popularity"]["nll"] is None
    page = (folder / "study.md").read_text(encoding="utf-8")
    assert ("the floor popularity is over the test users of seed 1 alone" in page) == noted


def test_a_gain_that_only_flatter_scores_make_is_said_to_be_one():
    def compared(difference, verdict):
        return SimpleNamespace(difference=difference, verdict=verdict, family=True)

    pair = {
        "nll": compared(-0.9, "better"),
        "nll_calibrated": compared(-0.01, "interval spans zero"),
        "mgu@5": compared(-0.02, "better"),
        "nll_worst_relevance_group": compared(-0.5, "better"),
        "nll_calibrated_worst_relevance_group": compared(-0.4, "better"),
    }
    block = SimpleNamespace(
        setting="default", seeds={"sft": [0, 1], "gdrt": [0, 1]}, comparisons={"sft": {"gdrt": pair}}
    )
    assert sentence(block, "gdrt", "sft", False) == (
        "**gdrt** against sft: better on Target NLL (-0.9000 as scored; calibrated -0.0100, not shown), "
        "MGU@5 (-0.0200), "
        "NLL, worst group (-0.5000), NLL, calibrated, worst group (-0.4000)."
    )
    pair["nll_calibrated"] = compared(0.2, "worse")
    assert "Target NLL (-0.9000 as scored; calibrated +0.2000, worse)" in sentence(
        block, "gdrt", "sft", False
    )


@pytest.mark.parametrize(
    "own, words",
    [([0, 1, 2], "sft:"), ([1, 2], "sft (2 seeds):"), ([2], "sft (seed 2 alone):")],
)
def test_a_line_says_how_many_seeds_it_is_about_where_rows_differ(own, words):
    lower = SimpleNamespace(difference=-0.5, verdict="better", family=True)
    block = SimpleNamespace(
        setting="default",
        seeds={"sft": [0, 1, 2], "gdrt": own},
        comparisons={"sft": {"gdrt": {"nll": lower}}},
    )
    assert sentence(block, "gdrt", "sft", False).startswith(f"**gdrt** against {words} better on Target NLL")


def test_one_seed_is_said_to_have_intervals_over_users_alone(tmp_path):
    folder = study_folder(tmp_path, [("sft", 0), ("gdrt", 0)], floors={})
    page = write_study(folder, num_bootstrap=50)
    assert page.sections[0].paragraphs[1].startswith("**gdrt** against sft (seed 0 alone): ")
    assert all("over users alone" in figure["caption"] for figure in page.sections[0].figures)
    text = (folder / "study.md").read_text(encoding="utf-8")
    assert "Intervals are over users alone for sft (seed 0), gdrt (seed 0)." in text
    assert "One seed is shared, so intervals are over users alone: gdrt." in text
    assert "What rests on one seed has an interval over users alone." in text
    both = study_folder(tmp_path / "both", ALL_CELLS, floors={})
    write_study(both, num_bootstrap=50)
    assert "over users alone" not in (both / "study.md").read_text(encoding="utf-8")


def test_rows_of_a_study_are_compared_over_losses_that_all_have_and_of_one_scoring(tmp_path):
    folder = study_folder(tmp_path, [("sft", 0), ("gdrt", 0)], floors={})
    evaluation = folder / "runs/gdrt-seed0/eval/test-renormalised"
    lines = (evaluation / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[:5]:
        row["target_nll"] = None
    (evaluation / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_study(folder, num_bootstrap=50)
    block = json.loads((folder / "study.json").read_text())["settings"]["default"]
    assert block["differences"]["sft"]["gdrt"]["nll"]["n"] == len(rows) - 5
    assert f"5 of {len(rows)} samples lack a finite NLL" in (folder / "study.md").read_text(encoding="utf-8")
    results = json.loads((evaluation / "results.json").read_text())
    (evaluation / "results.json").write_text(json.dumps({**results, "scoring": "full"}))
    write_study(folder, num_bootstrap=50)
    block = json.loads((folder / "study.json").read_text())["settings"]["default"]
    assert "nll" not in block["differences"]["sft"]["gdrt"] and "nll" in block["rows"]["gdrt"]
    assert any("differ in their scoring" in note for note in block["notes"])


def test_a_row_is_better_than_a_floor_only_if_each_of_its_seeds_is():
    def run(value, low, high, floor="markov"):
        entry = {"value": value, "ci_low": low, "ci_high": high, "higher_is_better": False}
        return SimpleNamespace(results={"minus_floors": {floor: {"nll": entry}}})

    runs = {
        "sft": {0: run(-0.3, -0.4, -0.2), 1: run(-0.1, -0.2, 0.1)},
        "gdrt": {0: run(-0.3, -0.4, -0.2), 1: run(-0.1, -0.2, -0.05), 2: run(0.5, 0.4, 0.6, "sasrec")},
    }
    found = beside_floors(runs)
    assert found["markov"]["sft"]["nll"] == BesideFloor(
        pytest.approx(-0.2), -0.4, 0.1, (0, 1), "interval spans zero"
    )
    assert found["markov"]["gdrt"]["nll"] == BesideFloor(pytest.approx(-0.2), -0.4, -0.05, (0, 1), "better")
    assert found["sasrec"] == {"gdrt": {"nll": BesideFloor(0.5, 0.4, 0.6, (2,), "worse")}}


def test_a_row_with_a_seed_without_an_interval_is_too_few_users_beside_a_floor():
    def run(value, low, high):
        entry = {"value": value, "ci_low": low, "ci_high": high, "higher_is_better": True}
        return SimpleNamespace(results={"minus_floors": {"markov": {"ndcg@10": entry}}})

    found = beside_floors({"sft": {0: run(0.25, None, None), 1: run(0.75, 0.5, 1.0)}})
    beside = found["markov"]["sft"]["ndcg@10"]
    assert beside == BesideFloor(0.5, None, None, (0, 1), "too few users to say")
    block = SimpleNamespace(rows=["sft"], beside_floors=found)
    (row,) = _against_floors(block, "").tables[0].rows
    assert row[3:] == ["+0.5000", "– to –", "0, 1", "too few users to say"]


def test_audits_are_drawn_with_intervals_where_a_row_has_several_seeds():
    title = "auxiliary:interaction, log2"
    block = SimpleNamespace(
        setting="default",
        rows={"sft": {}, "msl": {}},
        seeds={"sft": [0, 1], "msl": [0]},
        comparisons={},
        audits={
            title: {"sft": {0: 2.0, 1: 3.0}, "msl": {0: 1.5}},
            "known without it, nats": {"sft": {0: 0.1, 1: 0.1}, "msl": {0: 0.1}},
        },
    )
    (drawn,) = study_figures([block], "sft", [])
    (series,) = drawn["series"]
    half = (
        12.706 * 0.5
    )  # Student's t of one degree of freedom times the standard error of two values one apart
    assert drawn["categories"] == ["sft", "msl"] and series["values"] == [2.5, 1.5]
    assert series["low"] == [pytest.approx(2.5 - half, abs=1e-3), None] and series["high"] == [
        pytest.approx(2.5 + half, abs=1e-3),
        None,
    ]
    assert checked(drawn) == drawn


def test_only_the_columns_that_are_there_are_explained():
    assert set(AUDITS_EXPLAINED) <= set(AUDITED)
    last = "last item alone costs, nats"
    block = SimpleNamespace(
        rows={"sft": {}, "gdrt": {}},
        comparisons={"sft": {"gdrt": {}}},
        audits={last: {"sft": {0: 0.25}, "gdrt": {0: 0.5}}},
    )
    section = audits_section(block, "sft", "")
    (explained,) = section.paragraphs
    assert explained == AUDITS_EXPLAINED[last]
    (table,) = section.tables
    assert table.columns == ["row", last]
    assert table.rows == [["sft", "0.2500"], ["gdrt", "0.5000"], ["gdrt - sft", "0.2500"]]


def test_a_row_over_seeds_has_the_spread_of_a_mean_over_trainings():
    """Two-way model: value = seed effect + user noise.

    The interval's standard error must be that of a mean over fresh seeds and users.
    """
    rng = np.random.default_rng(0)
    errors, seeds, size = [], 5, 1000
    for _ in range(200):
        effects, users = rng.normal(0, 1.0, seeds), rng.normal(0, 0.5, size)
        found = combine([Resampled(e, e + users, 100, True, (-np.inf, np.inf)) for e in effects])
        errors.append(total_error(found)[0] ** 2)
    assert np.mean(errors) == pytest.approx(1.0 / seeds + 0.25, rel=0.12)


def test_one_seed_leaves_users_alone():
    single = Resampled(0.4, np.linspace(0.3, 0.5, 101), 10, True, (0, 1))
    assert interval(combine([single])) == interval(single)
    mean, low, high = t_interval([1.0, 2.0, 3.0])
    assert mean == 2 and low == pytest.approx(4 - high)
    assert high - 2 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
