"""A started-again evaluation: what is finished is kept, what depends on other settings is never mixed in."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from eval import loading
from eval import predictions as predictions_module
from eval.audit import AuditOptions, FinishedAudits, running
from eval.predictions.parts import read_parts
from eval.run import main
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.runtime import Runtime
from tests.eval.run_folders import fails, make_run

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
FAST = ["--bootstrap", "50", "--floors", "popularity,markov"]  # sasrec has tests of its own


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("scoring") / "run")


@pytest.fixture(scope="module")
def evaluated(run):
    main(["--run", str(run), *FAST])
    return run / "eval" / "test-renormalised"


def rows(folder):
    return [
        json.loads(line)
        for line in (Path(folder) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def strip(row: dict) -> dict:
    """A prediction without the numbers that batch sizes and ranks round differently."""
    return {**row, "target_nll": 0, "top_scores": 0, "nll_at_temperatures": 0}


def test_a_restart_goes_on_where_a_killed_evaluation_ended(run, evaluated, tmp_path, monkeypatch):
    shutil.copytree(evaluated, tmp_path / "out")
    part = tmp_path / "out" / "parts" / "rank_0.jsonl"
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
    part.write_text("".join(lines[:30]) + lines[30][:40], encoding="utf-8")  # killed in the middle of a write
    scored, original = [], predictions_module.SampleScorer.score
    monkeypatch.setattr(
        predictions_module.SampleScorer,
        "score",
        lambda self, samples: scored.extend(samples) or original(self, samples),
    )
    main(["--run", str(run), "--output", str(tmp_path / "out"), *FAST])
    assert len(scored) == 10
    assert list(map(strip, rows(tmp_path / "out"))) == list(map(strip, rows(evaluated)))


def test_finished_samples_get_the_relevance_groups_of_the_run_that_takes_them_up(run, tmp_path, monkeypatch):
    """Two runs with one base and other groups evaluate that base into one folder."""
    out = tmp_path / "out"
    base = ["--run", str(run), "--base", "--output", str(out), "--limit", "10", *FAST]
    main(base)
    before = rows(out)
    monkeypatch.setattr(loading, "relevance_groups", lambda run, corpus, catalogue: np.arange(24) % 3)
    main(base)
    index_of = Catalogue.load(run / "catalogue.jsonl").index_of
    groups = [index_of[row["target_id"]] % 3 for row in before]
    assert groups != [row["relevance_group"] for row in before]
    assert rows(out) == [{**row, "relevance_group": group} for row, group in zip(before, groups)]
    slices = json.loads((out / "results.json").read_text())["breakdowns"]["relevance_group"]["groups"]
    assert sum(values["nll"]["n"] for values in slices.values()) == 10


def test_a_line_that_is_torn_within_a_letter_is_passed_over(tmp_path):
    whole = json.dumps({"sample_id": 0, "user_id": "José"}, ensure_ascii=False).encode()
    torn = whole.replace(b": 0", b": 1")[:-3]
    assert torn.endswith("José".encode()[:-1])
    (tmp_path / "rank_0.jsonl").write_bytes(whole + b"\n" + torn)
    assert read_parts(tmp_path) == {0: {"sample_id": 0, "user_id": "José"}}


def test_rows_of_an_earlier_version_are_scored_again_and_said(run, evaluated, tmp_path, capsys):
    shutil.copytree(evaluated, tmp_path / "out")
    part = tmp_path / "out" / "parts" / "rank_0.jsonl"
    found = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
    for row in found[:7]:
        del row["nll_at_temperatures"]
    part.unlink()
    (tmp_path / "out" / "parts" / "rank_1.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in found), encoding="utf-8"
    )  # read after rank 0's
    main(["--run", str(run), "--output", str(tmp_path / "out"), *FAST])
    assert "7 samples were scored by an earlier version" in capsys.readouterr().out
    assert list(map(strip, rows(tmp_path / "out"))) == list(map(strip, rows(evaluated)))
    assert all(len(row["nll_at_temperatures"]) for row in rows(tmp_path / "out"))


def test_audits_of_the_same_predictions_stay_and_those_of_others_go(run, evaluated, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)

    def audits():
        return json.loads((out / "results.json").read_text())["audits"]

    main(["--run", str(run), "--output", str(out), *FAST, "--audit", "sensitivity", "--audit-users", "12"])
    first = audits()["sensitivity"]
    main(["--run", str(run), "--output", str(out), *FAST, "--audit", "information", "--audit-users", "12"])
    assert (
        "audits of an earlier evaluation of the same predictions are kept: sensitivity"
        in capsys.readouterr().out
    )
    assert set(audits()) == {"sensitivity", "information"} and audits()["sensitivity"] == first
    assert "History sensitivity" in (out / "report.md").read_text()
    main(["--run", str(run), "--output", str(out), *FAST, "--base", "--overwrite"])
    assert audits() == {}


def test_a_killed_evaluation_keeps_the_audits_that_it_had_finished(
    run, evaluated, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    (out / "results.json").unlink()
    ran, original, killed_in = [], running._run_one, ["information"]

    def run_one(name, *rest):
        if name in killed_in:
            raise KeyboardInterrupt
        ran.append(name)
        return original(name, *rest)

    monkeypatch.setattr(running, "_run_one", run_one)

    def evaluation(users):
        words = ["--run", str(run), "--output", str(out), *FAST, "--audit-users", users]
        main([*words, "--audit", "sensitivity,information"])

    for _ in range(2):  # killed twice in the second audit: the first one runs once
        with pytest.raises(SystemExit):
            evaluation("12")
    assert ran == ["sensitivity"] and not (out / "results.json").exists()
    said = capsys.readouterr().out
    assert "audit sensitivity: finished before the interruption, and kept" in said
    assert said.index("NDCG@10") < said.index("audit sensitivity"), "the table comes before the audits"
    first = json.loads((out / "audits.json").read_text())["audits"]["sensitivity"]

    killed_in.clear()
    evaluation("12")
    found = json.loads((out / "results.json").read_text())["audits"]
    assert ran == ["sensitivity", "information"] and found["sensitivity"] == first
    assert not (out / "audits.json").exists()
    evaluation("12")  # a finished evaluation that is asked again computes again
    assert ran == ["sensitivity", "information"] * 2


def test_finished_audits_of_other_settings_are_not_taken(run, tmp_path):
    def finished(**options):
        return FinishedAudits(tmp_path, {"k": 50}, AuditOptions(**options), Runtime())

    finished(users=12).add("sensitivity", {"effect": 1})
    assert finished(users=12).found == {"sensitivity": {"effect": 1}}
    assert finished(users=13).found == {}
    assert FinishedAudits(tmp_path, {"k": 51}, AuditOptions(users=12), Runtime()).found == {}
    whole = (tmp_path / "audits.json").read_text()
    (tmp_path / "audits.json").write_text(whole[:40])  # killed in the middle of a write
    assert finished(users=12).found == {}


def test_an_evaluation_of_an_earlier_version_is_reused_with_its_audits(run, evaluated, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    results = json.loads((out / "results.json").read_text())
    key = results.pop("scoring_key")
    key["objective"] = key.pop("scoring")
    del results["format"]
    results |= {"objective": results.pop("scoring"), "scoring": key, "audits": {"kept": {"effect": None}}}
    (out / "results.json").write_text(json.dumps(results))
    (out / "scoring.json").write_text(json.dumps(key))
    before = (out / "parts" / "rank_0.jsonl").stat().st_mtime_ns
    main(["--run", str(run), "--output", str(out), *FAST])
    said = capsys.readouterr().out
    assert "scoring.json of an earlier version: its `objective` is read as `scoring`" in said
    assert (out / "parts" / "rank_0.jsonl").stat().st_mtime_ns == before, "samples were scored again"
    found = json.loads((out / "results.json").read_text())
    assert found["audits"] == {"kept": {"effect": None}}
    assert found["scoring_key"]["scoring"] == "renormalised"


def test_predictions_of_different_settings_are_never_mixed(run, evaluated, tmp_path, capsys):
    shutil.copytree(evaluated, tmp_path / "out")
    assert "another mode, scoring" in fails(
        capsys, ["--run", run, "--output", tmp_path / "out", "--mode", "full", *FAST]
    )
    assert "limit" in fails(capsys, ["--run", run, "--output", tmp_path / "out", "--limit", 5, *FAST])
    main(["--run", str(run), "--output", str(tmp_path / "out"), "--limit", "5", "--overwrite", *FAST])
    assert (
        len(rows(tmp_path / "out")) == 5
        and json.loads((tmp_path / "out" / "results.json").read_text())["limit"] == 5
    )
    assert "not a result" in capsys.readouterr().out
