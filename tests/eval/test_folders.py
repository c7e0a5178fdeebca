"""eval.folders: files of earlier versions read like those of today, damage is named, labels are distinct."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from eval import folders
from eval.audit.__main__ import main as audit_runs
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


def test_a_limited_evaluation_stands_for_a_run_only_where_there_is_no_other(tmp_path):
    limited = write(tmp_path / "run" / "eval" / "test-full-limit5", old_results(limit=5))
    assert find_evaluation(tmp_path / "run") == limited
    whole = write(tmp_path / "run" / "eval" / "test-full", old_results())
    os.utime(whole / "results.json", (1000, 1000))  # older than the limited one
    assert find_evaluation(tmp_path / "run") == whole


def side_by_side(folder: Path, second: dict) -> list[Path]:
    """Two evaluations with two measures each; `second` changes the other one."""
    found = []
    for place, (name, changes) in enumerate((("sft", {}), ("gdrt", second))):
        metrics = {
            metric: {"value": 0.3 - 0.01 * place, "ci_low": 0.2, "ci_high": 0.4, "higher_is_better": False}
            for metric in ("mgu@5", "dgu@5")
        }
        own = {"format": folders.FORMAT, "name": name, "objective": name, "split": "test", "mode": "full"}
        own |= {"scoring": "full", "num_samples": 90, "limit": None, "metrics": metrics}
        found.append(write(folder / name / "eval" / "test-full", {**own, **changes}))
    return found


def test_evaluations_of_different_splits_are_not_set_side_by_side(tmp_path):
    pair = side_by_side(tmp_path, {"split": "valid"})
    with pytest.raises(UserError, match="different splits: sft test, gdrt valid"):
        load_evaluations(pair, 2)


def test_an_audit_over_runs_says_what_the_evaluations_do_not_share(tmp_path, capsys):
    alike = side_by_side(tmp_path / "alike", {})
    assert folders.unlike(load_evaluations(alike, 2)) == []
    pair = side_by_side(tmp_path / "pair", {"limit": 20, "num_samples": 20, "scoring": "renormalised"})
    audit_runs(["debiasing", *map(str, pair), "--output", str(tmp_path), "--bootstrap", "20"])
    printed = capsys.readouterr().out
    page = (tmp_path / "debiasing.md").read_text(encoding="utf-8")
    for text in (printed, page):
        assert "Not a result: limited evaluations (--limit): gdrt to 20 samples." in text
        assert "differ in their scoring: sft full, gdrt renormalised." in text
        assert "differ in their number of samples: sft 90, gdrt 20." in text
    assert "**Not a result: limited evaluations" in page.split("## Audit")[0], "as a warning under the title"


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
