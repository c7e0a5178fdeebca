"""Runs that were trained in bfloat16 are scored exactly, in float32, and the difference is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from run_folders import make_run
from test_compare import write_folder

from eval.compare import compare_runs, load_run
from eval.loading import load_subject
from eval.precision import spread, target_losses
from eval.run import main
from gdrt_ds.inference.recommender import open_run, open_trained
from gdrt_ds.models import float32
from gdrt_ds.runtime import Runtime

FAST = ["--limit", "12", "--bootstrap", "20", "--no-floors"]


@pytest.fixture(scope="module", params=["none", "nf4"])
def run(request, tmp_path_factory):
    """A run of another machine: `auto` was bfloat16 there."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    settings = ["model.dtype=bfloat16", f"model.quantization={request.param}"]
    folder = make_run(folder, settings)
    (folder / "summary.json").write_text(json.dumps({"dtype": "bfloat16"}))
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(config.replace("dtype: bfloat16", "dtype: auto"), encoding="utf-8")
    return folder


def test_a_run_trained_in_bfloat16_is_scored_in_float32_and_its_scores_are_exact(run, tmp_path, capsys):
    main(["--run", str(run), "--output", str(tmp_path), *FAST])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["dtype"] == results["exactness"]["dtype"] == "float32"
    assert results["exactness"]["exact"] and results["exactness"]["difference_nats"] < 1e-4
    found = results["precision"]
    assert (found["trained"], found["scored"], found["num_users"]) == ("bfloat16", "float32", 8)
    samples = spread(load_subject(Runtime(), run=str(run), limit=12).samples)
    trained = open_trained(run, Runtime())
    assert trained.loaded.dtype == torch.bfloat16
    before = target_losses(trained, samples)
    difference = np.abs(target_losses(trained.ready(Runtime()), samples) - before)
    assert found["mean_difference_nats"] == pytest.approx(difference.mean(), abs=1e-4)
    assert found["max_difference_nats"] == pytest.approx(difference.max(), abs=1e-4)
    assert 1e-4 < found["mean_difference_nats"] < 0.2
    assert "scores are computed in float32, the training in bfloat16" in printed
    assert "the training in bfloat16" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_dtype_that_the_user_names_is_the_dtype_of_the_scores(run):
    assert open_run(run, Runtime(), ["model.dtype=bfloat16"]).reader.mask_dtype == torch.bfloat16
    named = open_run(run, Runtime(), ["model.dtype=float32"])
    assert named.reader.mask_dtype == torch.float32
    # The base is the one that was trained on, not one quantised anew from float32 weights.
    assert named.loaded.fingerprint == open_run(run, Runtime()).loaded.fingerprint


def test_an_adapter_is_merged_into_weights_in_float32_alone(run, monkeypatch):
    """16-bit weights would round it: scores in bfloat16 would then be those of another adapter."""
    plain = "quantization: none" in (run / "config.yaml").read_text(encoding="utf-8")
    said = "adapter merged into the base weights for scoring"
    merged = open_run(run, Runtime())
    assert (said in merged.lines) is plain is not hasattr(merged.loaded.model, "peft_config")
    named = open_run(run, Runtime(), ["model.dtype=bfloat16"])
    assert said not in named.lines and hasattr(named.loaded.model, "peft_config")
    monkeypatch.setattr(float32, "free_bytes", lambda device: 0)  # float32 fits in no form
    full = open_run(run, Runtime())
    assert full.loaded.dtype == torch.bfloat16
    assert said not in full.lines and hasattr(full.loaded.model, "peft_config")


def test_a_comparison_warns_of_scores_that_are_not_exact(tmp_path):
    folders = [write_folder(tmp_path / name / "eval", skill) for name, skill in (("a", 2.0), ("b", 2.5))]
    file = folders[1] / "results.json"
    results = json.loads(file.read_text())
    results["exactness"] = {"difference_nats": 0.15, "exact": False, "dtype": "bfloat16"}
    file.write_text(json.dumps(results))
    runs = [load_run(folder, label) for folder, label in zip(folders, "ab")]
    notes = compare_runs(runs, num_bootstrap=20).notes
    assert len([note for note in notes if "scores of b are not exact (bfloat16)" in note]) == 1
    assert not any("scores of a" in note for note in notes)
