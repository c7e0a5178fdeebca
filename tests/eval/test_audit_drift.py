"""The audit `drift` finds a training that leaves the history, and is silent about one that does not."""

from __future__ import annotations

import numpy as np
import pytest
from planted_context import HONEST_DATA, PlantedContext
from run_folders import make_run

from eval.audit import AuditOptions
from eval.audit.model import drift
from eval.loading import load_subject
from eval.report import figures
from gdrt_ds.runtime import Runtime

OPTIONS = AuditOptions(users=40, num_bootstrap=200, permutations=3)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return load_subject(Runtime(), run=str(make_run(tmp_path_factory.mktemp("drift") / "run", [HONEST_DATA])))


def training(subject, monkeypatch, plants: list[str | None]):
    """The audit of a run whose model is a formula at each step; only "shortcut" ignores the history."""
    steps = [
        (10 * place, PlantedContext(subject, Runtime(), OPTIONS, plant)) for place, plant in enumerate(plants)
    ]
    monkeypatch.setattr(drift, "walk", lambda context, most: iter(steps))
    return drift.run(steps[-1][1])


def test_a_training_that_turns_to_the_prompt_is_found(subject, monkeypatch):
    found = training(subject, monkeypatch, [None, None, "shortcut"])
    assert found["speaks"] and found["effect"]["ci_low"] > 1
    measures = found["measures"]
    assert measures["history sensitivity at step 10"]["ci_low"] > 0
    assert abs(measures["history sensitivity at step 20"]["value"]) < 0.01
    assert [row[0] for row in found["table"]["rows"]] == [0, 10, 20]
    assert all(figures.checked(figure) for figure in found["figures"])


def test_a_training_that_turns_to_the_history_does_not_speak_but_its_change_is_shown(subject, monkeypatch):
    found = training(subject, monkeypatch, [None, "shortcut", None])
    assert not found["speaks"] and found["effect"]["ci_high"] < -1


def test_a_training_that_changes_nothing_is_silent(subject, monkeypatch):
    found = training(subject, monkeypatch, ["shortcut", None, None])
    assert not found["speaks"] and found["effect"]["value"] == 0


def test_the_change_is_counted_from_the_first_checkpoint_and_from_the_base_where_there_is_only_one(
    subject, monkeypatch
):
    assert "From step 10 to step 20" in training(subject, monkeypatch, [None, None, None])["finding"]
    assert "From step 0 to step 10" in training(subject, monkeypatch, [None, None])["finding"]


def test_swapping_the_ends_at_random_leaves_no_change():
    rng = np.random.default_rng(0)
    one = rng.gamma(4.0, size=60)
    first = drift.Step(one, one, auxiliary=one, interaction=one)
    last = drift.Step(one, one, auxiliary=4 * one, interaction=one)
    rows = drift.ends(first, last)
    assert drift.change_of(rows) == pytest.approx(2.0)
    null = drift.permuted_changes(rows, seed=0)
    assert abs(null.mean()) < 0.1 and np.abs(null).max() < 1.5
