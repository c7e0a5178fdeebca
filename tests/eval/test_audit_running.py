"""An audit that cannot run is refused before scoring, or left out with a line, and costs nothing else."""

import json

import pytest
from planted_context import HONEST_DATA, PlantedContext
from run_folders import make_run

from eval import folders
from eval.audit import Audit, AuditOptions, Cost, audits, check_audits, run_audits, running
from eval.loading import load_subject
from eval.pipeline import run_evaluation
from eval.predictions import ScoringOptions
from gdrt_ds.errors import LostPeer, StorageError, UserError
from gdrt_ds.runtime import Runtime


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("planted") / "run", [HONEST_DATA])
    return load_subject(Runtime(), run=str(run), limit=4)


def evaluated(folder, seed):
    """A finished evaluation of a run with its own seed: no two of them share a setting that varies."""
    figure = {"ci_low": 0.1, "ci_high": 0.4, "higher_is_better": False}
    results = {
        "format": folders.FORMAT,
        "name": folder.name,
        "objective": "sft",
        "config": {"objective": "sft", "train": {"seed": seed}},
        "metrics": {name: {"value": 0.2 + 0.01 * seed, **figure} for name in ("mgu@5", "gini@10")},
    }
    path = folder / "eval" / "test"
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(results))
    return str(folder)


def test_runs_that_cannot_be_compared_are_refused_by_name_and_left_out_of_all(subject, tmp_path, capsys):
    runs = [evaluated(tmp_path / f"run-{seed}", seed) for seed in range(4)]
    options = AuditOptions(users=4, num_bootstrap=50, runs=tuple(runs))
    context = PlantedContext(subject, Runtime(), options)
    with pytest.raises(UserError, match="--audit cross_tuning: no setting"):
        check_audits(["cross_tuning"], context)
    with pytest.raises(UserError, match="has no predictions.jsonl and no catalogue.jsonl"):
        check_audits(["titles"], context)
    check_audits(["all"], context)
    found = run_audits(["all", "sensitivity"], context)
    printed = capsys.readouterr().out
    assert "sensitivity" in found and "debiasing" in found and "cross_tuning" not in found
    assert "audit cross_tuning: left out of `all`: no setting" in printed
    assert "audit titles: left out of `all`: --runs: " in printed


def test_a_folder_that_is_named_twice_counts_once(subject, tmp_path):
    runs = [evaluated(tmp_path / f"run-{seed}", seed) for seed in range(3)]
    options = AuditOptions(users=4, num_bootstrap=50, runs=(*runs, f"{runs[0]}/eval/test"))
    with pytest.raises(UserError, match=r"3 folder\(s\) given, at least 4 are compared"):
        check_audits(["cross_tuning"], PlantedContext(subject, Runtime(), options))


def refuses(context):
    raise UserError("nothing is left to compare", "give other runs")


def test_an_audit_that_refuses_late_costs_neither_the_others_nor_the_evaluation(
    subject, tmp_path, monkeypatch, capsys
):
    late = Audit("Late", "Does it refuse after the scores?", refuses, lambda context: Cost(), order=1)
    early = Audit("Early", "Does it stay?", audits()["sensitivity"].run, lambda context: Cost(), order=0)
    monkeypatch.setattr(running, "audits", lambda: {"early": early, "late": late})
    options = AuditOptions(users=4, num_bootstrap=50)
    assert list(run_audits(["all"], PlantedContext(subject, Runtime(), options))) == ["early"]
    assert "audit late: left out of `all`: nothing is left to compare (give other runs)" in (
        capsys.readouterr().out
    )
    scoring = ScoringOptions("renormalised", "", 10)
    settings = {"floors": "none", "num_bootstrap": 50, "audits": ["early", "late"], "audit_options": options}
    with pytest.raises(UserError, match="--audit late: nothing is left to compare"):
        run_evaluation(subject, scoring, Runtime(), output=tmp_path, **settings)
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written["audits"]) == ["early"] and written["metrics"]["hr@10"]["n"] == 4
    assert not (tmp_path / "audits.json").exists()


@pytest.mark.parametrize("error", [StorageError, LostPeer])
def test_a_full_disk_or_a_dead_rank_is_no_matter_of_an_audit(subject, tmp_path, monkeypatch, error):
    """Such an evaluation ends with the status that says so. It is not told as an audit that was left out."""

    def breaks(context):
        raise error("it broke", "mend it")

    broken = Audit("Broken", "Does it end the evaluation?", breaks, lambda context: Cost(), order=0)
    monkeypatch.setattr(running, "audits", lambda: {"broken": broken})
    options = AuditOptions(users=4, num_bootstrap=50)
    with pytest.raises(error):
        run_audits(["all"], PlantedContext(subject, Runtime(), options))
    settings = {"floors": "none", "num_bootstrap": 50, "audits": ["broken"], "audit_options": options}
    with pytest.raises(error):
        run_evaluation(
            subject, ScoringOptions("renormalised", "", 10), Runtime(), output=tmp_path, **settings
        )
    assert not (tmp_path / "results.json").exists()
