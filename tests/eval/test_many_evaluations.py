"""Many runs evaluated in one process: what a failure and what Ctrl-C does to the rest."""

from __future__ import annotations

import pytest

import eval.run
from eval.study.batch import INTERRUPTED, evaluate_runs
from gdrt_ds.errors import UserError
from gdrt_ds.runtime import report_user_errors


@pytest.fixture
def started(monkeypatch):
    """Runs whose evaluation was started; those called by the name of a failure fail by it."""
    names = []
    failures = {
        "bug": ValueError("a bug"),
        "refused": UserError("refused", "fix"),
        "stopped": KeyboardInterrupt(),
    }

    def evaluate(words):
        names.append(words[1].rsplit("/", 1)[-1])
        with report_user_errors(interrupted="stopped"):
            if names[-1] in failures:
                raise failures[names[-1]]

    monkeypatch.setattr(eval.run, "main", evaluate)
    return names


def test_one_that_fails_does_not_end_the_others_and_its_log_says_why(started, tmp_path):
    runs = [str(tmp_path / name) for name in ("bug", "refused", "sound")]
    assert evaluate_runs(runs, []) == 2
    assert started == ["bug", "refused", "sound"]
    assert "ValueError: a bug" in (tmp_path / "bug" / "logs" / "evaluation.log").read_text()
    assert "refused" in (tmp_path / "refused" / "logs" / "evaluation.log").read_text()


def test_ctrl_c_ends_them_all(started, tmp_path, capsys):
    runs = [str(tmp_path / name) for name in ("sound", "stopped", "other")]
    with pytest.raises(SystemExit) as end:
        evaluate_runs(runs, [])
    assert end.value.code == INTERRUPTED == 130
    assert started == ["sound", "stopped"]
    assert "stopped: evaluation failed with status 130" in capsys.readouterr().out
