"""eval.folders: files of earlier versions read like those of today, damage is named, labels are distinct."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import folders
from eval.folders import current_scoring_key, find_evaluation, labels_of, load_evaluations, read_results
from gdrt_ds.errors import UserError

OLD_KEY = {"model": "m", "adapter": "a", "mode": "beam", "objective": "full", "k": 50}


def old_results(**changes) -> dict:
    """results.json as the version before `format` wrote it for a run in runs/mine."""
    config = {"objective": "gdrt", "run": {"dir": "runs/mine"}, "train": {"seed": 3}}
    return {
        "metrics": {},
        "name": "mine",
        "objective": "full",
        "mode": "beam",
        "config": config,
        "scoring": OLD_KEY,
        **changes,
    }


def write(folder: Path, results: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def test_results_of_an_earlier_version_are_read_under_the_current_names_and_said_once(tmp_path, capsys):
    folders._say_once.cache_clear()
    first = read_results(write(tmp_path / "first", old_results()))
    read_results(write(tmp_path / "second", old_results()))
    assert (first["scoring"], first["objective"], first["mode"]) == ("full", "gdrt", "beam")
    assert first["scoring_key"] == {"model": "m", "adapter": "a", "mode": "beam", "scoring": "full", "k": 50}
    assert capsys.readouterr().out.count("results.json of an earlier version") == 1


def test_results_of_this_version_are_left_as_they_are(tmp_path, capsys):
    written = {
        "format": folders.FORMAT,
        "scoring": "renormalised",
        "objective": "msl",
        "scoring_key": {"k": 1},
    }
    assert read_results(write(tmp_path / "new", written)) == written
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "changes",
    [{"name": "mine (base)", "scoring": {**OLD_KEY, "adapter": ""}}, {"name": "elsewhere"}],
    ids=["a base model", "a model trained elsewhere, whose config holds defaults"],
)
def test_an_objective_that_was_not_trained_is_not_claimed(tmp_path, changes):
    assert read_results(write(tmp_path / "eval", old_results(**changes)))["objective"] is None


def test_a_scoring_key_of_this_version_stays():
    key = {"mode": "full", "scoring": "full"}
    assert current_scoring_key(key) == key


def test_a_run_stands_for_its_newest_evaluation_of_its_own_model(tmp_path):
    import os

    for age, name in enumerate(("test-full", "test-renormalised", "test-renormalised-base")):
        path = write(tmp_path / "run" / "eval" / name, old_results()) / "results.json"
        os.utime(path, (1000 + age, 1000 + age))
    assert find_evaluation(tmp_path / "run").name == "test-renormalised"
    (found,) = load_evaluations([tmp_path / "run", tmp_path / "run"], 1)
    assert found.label == "run" and found.setting("train.seed") == "3" and found.setting("train.lr") == "?"
    with pytest.raises(UserError, match="1 folder.* at least 2"):
        load_evaluations([tmp_path / "run"], 2)
    with pytest.raises(UserError, match="holds no evaluation"):
        find_evaluation(tmp_path)


def test_damaged_files_are_named_with_the_line(tmp_path):
    folder = write(tmp_path / "eval", old_results())
    lines = folder / "predictions.jsonl"
    lines.write_text('{"title": "a line\u2028separator"}\n{"rank":\n', encoding="utf-8")
    with pytest.raises(UserError, match="predictions.jsonl, line 2 is not JSON"):
        folders.read_json_lines(lines)
    (folder / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="results.json is not JSON"):
        read_results(folder)
    with pytest.raises(UserError, match="nowhere/results.json cannot be read"):
        read_results(tmp_path / "nowhere")


def test_labels_are_the_parts_of_the_paths_that_differ():
    assert labels_of(["runs/a/eval", "runs/b/eval"]) == ["a", "b"]
    assert labels_of(["runs/a/eval", "runs/a/eval-base"]) == ["eval", "eval-base"]
    assert labels_of(["x/a/eval/test", "x/b/eval/test"]) == ["a", "b"]
    assert labels_of(["x/a/eval/test-full", "x/b/eval/test-beam"]) == ["a", "b"]
    assert labels_of(["x/a/eval/test-full", "x/a/eval/test-beam"]) == ["full", "beam"]
    assert labels_of(["x/a/eval/test-full"]) == ["a"]
    shared = labels_of(["r/planted-sft-eval", "r/planted-gdrt-eval"])
    assert shared == ["sft", "gdrt"], "words that all names share say nothing"
    assert labels_of(["r/a-eval", "r/a-b-eval"]) == ["a", "a-b"]
    assert labels_of(["r/a-a", "r/a"]) == ["a-a", "a"], "no name becomes empty"
    with pytest.raises(UserError, match="given twice"):
        labels_of(["r/a", "r/../r/a"])
