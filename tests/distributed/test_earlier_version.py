"""Folders that an earlier version made are opened by this one: a run resumes, is evaluated, and is compared.

The earlier version is the last commit before the modules moved into packages. It is taken from the history
and run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.golden import PLANTED, cut_back, read_lines

ROOT = Path(__file__).resolve().parents[2]
EARLIER = "fc0416f"
pytestmark = pytest.mark.distributed


def call(home: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(home), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run and its evaluation, both made by the earlier version."""
    known = subprocess.run(["git", "cat-file", "-e", f"{EARLIER}^{{commit}}"], cwd=ROOT, capture_output=True)
    if known.returncode != 0:
        pytest.skip(f"commit {EARLIER} is not in this clone: it is a shallow one, or not a git checkout")
    folder = tmp_path_factory.mktemp("earlier")
    home = folder / "checkout"
    home.mkdir()
    archive = subprocess.run(["git", "archive", EARLIER], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(home)], input=archive, check=True)
    run, settings = folder / "run", [*PLANTED, "objective=gdrt", "train.save_every=4"]
    call(home, "gdrt_ds/train.py", *settings, f"run.dir={run}")
    call(
        home, "-m", "eval.run", "--run", str(run), "--output", str(folder / "evaluation"), "--bootstrap", "50"
    )
    return folder, run, settings


def test_its_run_resumes_with_the_losses_it_would_have_had(made):
    folder, run, settings = made
    resumed = folder / "resumed"
    shutil.copytree(run, resumed)
    cut_back(resumed, 4)
    call(ROOT, "gdrt_ds/train.py", *settings, f"run.dir={resumed}", "resume=auto")
    expected, found = read_lines(run / "metrics.jsonl"), read_lines(resumed / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, 9))
    for before, now in zip(expected, found, strict=True):
        assert now["loss"] == pytest.approx(before["loss"], rel=1e-9)
        weights = [
            [w or 0.0 for w in line["group_weight"]] for line in (before, now)
        ]  # null: an absent group
        assert weights[1] == pytest.approx(weights[0], rel=1e-9)


def test_its_run_is_evaluated_alike_and_its_evaluation_compares(made):
    folder, run, _ = made
    quick = ("--bootstrap", "50", "--floors", "popularity,markov")
    call(ROOT, "-m", "eval.run", "--run", str(run), "--output", str(folder / "again"), *quick)
    before, now = (
        json.loads((folder / name / "results.json").read_text(encoding="utf-8"))["metrics"]
        for name in ("evaluation", "again")
    )
    assert before.keys() <= now.keys()
    for name, figure in before.items():
        assert now[name]["value"] == pytest.approx(figure["value"], rel=1e-6, abs=1e-9), name
    folders = [str(folder / name) for name in ("evaluation", "again")]
    call(ROOT, "-m", "eval.compare", *folders, "--output", str(folder / "comparison"))
    assert (folder / "comparison" / "compare.html").is_file()
