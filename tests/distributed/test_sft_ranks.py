"""Rows of prompt and completion on two ranks of ZeRO-3 and NF4: resumed to the bit, and equal when padded."""

import json
from pathlib import Path

import pytest

from eval.compare.__main__ import main as compare
from eval.run import main as evaluate
from tests.forked import run_scenario

pytestmark = pytest.mark.distributed
STEPS = 6


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_scenario("scenario_sft", tmp_path_factory.mktemp("sft"))


def test_gdrt_group_dro_and_cvar_train_and_the_stopped_run_asks_for_a_requeue(report):
    assert report["status"] == [[0, 0], [75, 75], [0, 0], [0, 0], [0], [0, 0]]
    for name in ("straight", "tree", "cvar"):
        assert [record[0] for record in report[name]] == list(range(1, STEPS + 1))
        assert report[name][-1][1] < report[name][0][1]


def test_a_resumed_run_is_bitwise_the_straight_one(report):
    assert report["stopped"] == report["straight"]


def test_one_rank_with_padded_rows_computes_what_two_ranks_compute_as_a_prefix_tree(report):
    for tree, padded in zip(report["tree"], report["padded"], strict=True):
        assert tree[1] == pytest.approx(padded[1], rel=1e-4)
        assert tree[2] == pytest.approx(padded[2], rel=1e-4)
        assert tree[3] == pytest.approx(padded[3], rel=1e-4)
        assert tree[4] == pytest.approx(padded[4], rel=1e-3)


def test_the_run_folder_has_a_prompt_and_no_catalogue(report):
    run = Path(report["folder"]) / "straight"
    assert (run / "prompt.json").is_file() and (run / "adapter").is_dir()
    assert not (run / "catalogue.jsonl").exists()


def test_the_runs_are_evaluated_in_the_groups_of_their_training_and_compared(report):
    folder = Path(report["folder"])
    for name in ("straight", "cvar"):
        evaluate(["--run", str(folder / name), "--bootstrap", "100"])
    results = json.loads((folder / "straight" / "eval" / "test-full" / "results.json").read_text())
    assert [name.split(" in ")[0] for name in results["group_names"]] == ["r", "r", "r"]
    counts = json.loads((folder / "straight" / "groups.json").read_text())["counts"]
    assert len(counts) == 3 and results["metrics"]["nll_worst_group"]["n"] == results["num_samples"]
    output = folder / "comparison"
    folders = [str(folder / name / "eval" / "test-full") for name in ("straight", "cvar")]
    assert compare([*folders, "--output", str(output), "--num-bootstrap", "100"]) == 0
    notes = json.loads((output / "compare.json").read_text())["notes"]
    assert any(note.startswith("token groups differ") for note in notes)
