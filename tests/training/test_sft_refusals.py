"""What rows of prompt and completion cannot do is refused before a model is loaded, also by --plan."""

from __future__ import annotations

import pytest

from gdrt_ds.config import load_config
from gdrt_ds.errors import UserError
from gdrt_ds.objectives import objectives
from gdrt_ds.training.preflight import check_data
from gdrt_ds.training.preparation import prepare
from gdrt_ds.training.step_inputs import token_weights
from tests.data.sft_files import rows, write_lines, write_splits
from tests.training.test_preflight import refusal_before_loading


def settings(path, folder, *overrides):
    return load_config(
        None,
        [
            f"data.path={path}",
            f"run.dir={folder}",
            "model.path=tiny-random",
            "train.global_batch=4",
            "groups.num=3",
            *overrides,
        ],
    )


@pytest.mark.parametrize("objective", ["msl", "gdrt+msl", "igd"])
def test_objectives_over_a_catalogue_are_refused(objective, tmp_path, monkeypatch):
    path = write_splits(tmp_path / "data", (16, 4, 4))
    found = refusal_before_loading([f"data.path={path}", f"objective={objective}"], tmp_path, monkeypatch)
    assert f"objective = {objective} compares a target with a catalogue" in found.problem
    assert "group_dro" in found.fix and "igd" not in found.fix


@pytest.mark.parametrize("by", ["provider", "item_popularity", "user_attribute"])
def test_groups_of_items_and_users_are_refused(by, tmp_path, monkeypatch):
    path = write_splits(tmp_path / "data", (16, 4, 4))
    given = [f"data.path={path}", f"groups.by={by}", "groups.column=kind"]
    found = refusal_before_loading(given, tmp_path, monkeypatch)
    assert f"groups.by = {by} is about items and users" in found.problem


def test_relevance_without_auxiliary_prompts_and_labels_without_groups_are_refused(tmp_path, monkeypatch):
    bare = [{name: row[name] for name in ("prompt", "completion", "kind")} for row in rows(30)]
    path = write_lines(tmp_path / "rows.jsonl", bare)
    found = refusal_before_loading([f"data.path={path}"], tmp_path, monkeypatch)
    assert "row 1 of its split has no auxiliary_prompt" in found.problem
    found = refusal_before_loading([f"data.path={path}", "groups.by=label"], tmp_path, monkeypatch)
    assert "no row of train has the field `group`" in found.problem
    given = [f"data.path={path}", "groups.by=column", "groups.column=colour"]
    found = refusal_before_loading(given, tmp_path, monkeypatch)
    assert "groups.column = 'colour'" in found.problem and "available: kind" in found.fix


def test_growing_windows_of_rows_are_refused_as_settings(tmp_path):
    with pytest.raises(UserError, match="data.windows = growing makes windows of interactions"):
        settings(tmp_path, tmp_path, "data.format=sft", "data.windows=growing")


@pytest.mark.parametrize(
    ("by", "groups"), [("label", 3), ("column", 2), ("position", 3), ("length", 3), ("relevance", 3)]
)
def test_groups_of_rows_are_made_before_a_model_is_loaded(by, groups, tmp_path):
    data = rows(40)
    for place, row in enumerate(data):
        row["completion"] += " again" * (place % 5)
        del row["choices"]
    path = write_lines(tmp_path / "rows.jsonl", data)
    given = [f"groups.by={by}", "groups.reference=corpus", "groups.binning=uniform"]
    if by == "column":
        given.append("groups.column=kind")
    config = settings(path, tmp_path / "run", *given)
    lines = check_data(config, prepare(config))
    assert any(f"{groups} groups" in line for line in lines) == (groups != 3)


def test_labels_that_train_lacks_are_counted_and_refused_where_valid_has_no_other(tmp_path, monkeypatch):
    path = write_splits(tmp_path / "data", (16, 4, 4))
    valid = rows(4, 1)
    valid[0]["group"] = "never seen"
    write_lines(path / "valid.jsonl", valid)
    config = settings(path, tmp_path / "run", "groups.by=label")
    lines = check_data(config, prepare(config))
    counted = [line for line in lines if "of valid have a label that train lacks" in line]
    assert len(counted) == 1 and not counted[0].startswith("0 of")
    write_lines(path / "valid.jsonl", [{**row, "group": "never seen"} for row in valid])
    found = refusal_before_loading([f"data.path={path}", "groups.by=label"], tmp_path, monkeypatch)
    assert "no label of valid is one of train's, " in found.problem


def test_a_reference_that_an_objective_does_not_use_is_told(tmp_path):
    path = write_splits(tmp_path / "data", (16, 4, 4))
    config = settings(path, tmp_path / "run", "groups.by=label", "objective=sft", "dro.excess=true")
    lines = check_data(config, prepare(config))
    assert [line for line in lines if line.startswith("dro.excess = True is not used with objective=sft")]


def test_reweight_weighs_a_row_by_how_often_train_has_its_completion(tmp_path):
    config = settings(write_splits(tmp_path / "data", (40, 4, 4)), tmp_path / "run")
    prepared = prepare(config)
    weights = token_weights(prepared, None, objectives()["reweight"], config.options)
    completions = [row.completion for row in prepared.data.rows["train"]]
    counts = [completions.count(text) for text in completions]
    of_row = weights[prepared.stores["train"].target_offsets[:-1]]
    assert of_row[0] * counts[0] == pytest.approx(of_row[-1] * counts[-1])
    assert len(set(counts)) == 2
