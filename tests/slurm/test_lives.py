"""Decisions between the lives of a run (slurm/lives.py, slurm/grid.py): no Slurm is needed to make them."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HOME / "slurm"))

import grid  # noqa: E402
import lives  # noqa: E402

CONFIG = str(HOME / "configs" / "smoke.yaml")


def call(main, *words, **env):
    """(exit status, answer, stderr) of one call, as the batch script sees it."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
    answer = dict(line.split("=", 1) for line in out.getvalue().splitlines() if "=" in line)
    return code, answer, err.getvalue()


def begin(run, job="7", restart=0, *more, overrides=(), **env):
    return call(
        lives.main,
        "begin",
        "--job",
        job,
        "--restart",
        restart,
        *more,
        "--",
        "--config",
        CONFIG,
        f"run.dir={run}",
        *overrides,
        **env,
    )


def end(run, code, job="7", restart=0, state="RUNNING", reason="None", **env):
    return call(
        lives.main,
        "end",
        "--job",
        job,
        "--restart",
        restart,
        "--run-dir",
        run,
        "--code",
        code,
        "--state",
        state,
        "--reason",
        reason,
        **env,
    )


def checkpoint(run, step, start=1):
    folder = run / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"life": start}))


def started(run, number):
    (run / "life").write_text(json.dumps({"life": number}))


def summary(run, status):
    (run / "summary.json").write_text(json.dumps({"status": status}))


def rank_ended(run, rank, code, when, job="7", restart=0):
    (run / "logs" / "slurm" / f"job_{job}_life_{restart}" / f"rank_{rank}.exit").write_text(
        f"{code} {when} node{rank + 1}\n"
    )


def test_an_interrupted_run_is_requeued_and_its_next_life_resumes(tmp_path):
    run = tmp_path / "run"
    assert begin(run)[1]["EXTRA"] == "(resume=auto)"
    checkpoint(run, 30)
    assert end(run, 75)[1]["VERDICT"] == "requeue"
    code, answer, said = begin(run, restart=1)
    assert (code, answer["VERDICT"]) == (0, "start") and "from checkpoint step 30" in said


def test_a_finished_run_starts_no_life(tmp_path):
    run = tmp_path / "run"
    begin(run)
    summary(run, "completed")
    assert end(run, 0)[1] == {"VERDICT": "done", "CODE": "0"}
    assert begin(run, job="8")[1]["VERDICT"] == "finished"


def test_a_signal_after_the_last_word_of_a_run_changes_nothing(tmp_path):
    run = tmp_path / "run"
    begin(run)
    summary(run, "completed")
    rank_ended(run, 0, 138, 100.0)
    assert end(run, 138)[1] == {"VERDICT": "done", "CODE": "0"}


def test_exit_without_a_completed_summary_is_a_failure(tmp_path):
    run = tmp_path / "run"
    begin(run)
    assert end(run, 0)[1] == {"VERDICT": "stop", "CODE": "1"}


def test_a_users_mistake_never_requeues(tmp_path):
    run = tmp_path / "run"
    begin(run)
    checkpoint(run, 10)
    rank_ended(run, 0, 2, 100.0)
    rank_ended(run, 1, 143, 101.0)
    assert end(run, 143)[1] == {"VERDICT": "stop", "CODE": "2"}


def test_the_rank_that_ended_first_is_named_as_the_cause(tmp_path):
    run = tmp_path / "run"
    begin(run)
    checkpoint(run, 10)
    rank_ended(run, 1, 137, 100.0)
    rank_ended(run, 0, 75, 103.0)
    code, answer, said = end(run, 137)
    assert (
        answer["VERDICT"] == "requeue" and "rank 1 on node2 ended with status 137 (killed by signal 9" in said
    )


def test_a_full_disk_holds_the_job(tmp_path):
    run = tmp_path / "run"
    begin(run)
    checkpoint(run, 10)
    rank_ended(run, 0, 74, 100.0)
    code, answer, said = end(run, 74)
    assert answer["VERDICT"] == "hold" and "scontrol release 7" in said


def test_two_lives_without_a_new_checkpoint_stop_the_job(tmp_path):
    run = tmp_path / "run"
    begin(run)
    checkpoint(run, 10)
    assert end(run, 1)[1]["VERDICT"] == "requeue"
    begin(run, restart=1)
    assert end(run, 1, restart=1)[1]["VERDICT"] == "requeue"  # one life without progress
    begin(run, restart=2)
    code, answer, said = end(run, 1, restart=2)
    assert answer["VERDICT"] == "stop" and "no progress: 2 lives in a row" in said


def test_lives_that_slurm_ended_without_a_word_count_as_no_progress_too(tmp_path):
    run = tmp_path / "run"
    begin(run)
    begin(run, restart=1)
    code, _, said = begin(run, restart=2)
    assert code == 1 and "no progress" in said
    assert begin(run, restart=2, GDRT_MAX_STALLED="5")[0] == 0
    assert begin(run, job="8")[0] == 0, "a new submission starts counting anew"


def test_the_number_of_requeues_is_limited(tmp_path):
    run = tmp_path / "run"
    begin(run, GDRT_MAX_REQUEUES="1")
    checkpoint(run, 10)
    assert end(run, 75, GDRT_MAX_REQUEUES="1")[1]["VERDICT"] == "requeue"
    begin(run, restart=1, GDRT_MAX_REQUEUES="1")
    checkpoint(run, 20)
    code, answer, said = end(run, 75, restart=1, GDRT_MAX_REQUEUES="1")
    assert answer["VERDICT"] == "stop" and "1 requeues are used up" in said


def test_a_cancelled_job_is_not_brought_back_but_one_at_its_time_limit_is(tmp_path):
    run = tmp_path / "run"
    begin(run)
    checkpoint(run, 10)
    assert end(run, 75, state="COMPLETING")[1]["VERDICT"] == "stop"
    assert end(run, 75, state="COMPLETING", reason="TimeLimit")[1]["VERDICT"] == "requeue"


def test_an_explicit_checkpoint_is_where_a_job_starts_until_it_has_one_of_its_own(tmp_path):
    """A life that is preempted before it saves must not send the next one to step 0, or to another step."""
    run = tmp_path / "run"
    named = ["resume=step_10"]
    for folder, saved in ((run, ()), (tmp_path / "with_later_steps", (10, 50))):
        for step in saved:
            checkpoint(folder, step, start=1)
        if saved:
            started(folder, 1)
        assert begin(folder, overrides=named)[1]["EXTRA"] == "()"
        started(folder, 2)
        assert begin(folder, restart=1, overrides=named)[1]["EXTRA"] == "()"
        checkpoint(folder, 15, start=3)
        assert begin(folder, restart=2, overrides=named)[1]["EXTRA"] == "(resume=auto)"


def test_progress_is_counted_from_the_step_that_a_run_was_sent_back_to(tmp_path):
    run = tmp_path / "run"
    for step in (10, 50):
        checkpoint(run, step, start=1)
    started(run, 1)
    for restart, step in enumerate((15, 20, 25)):
        code, _, said = begin(run, restart=restart, overrides=["resume=step_10"])
        assert code == 0, said
        checkpoint(run, step, start=2 + restart)
        assert end(run, 75, restart=restart)[1]["VERDICT"] == "requeue"


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["run.overwrite=true"], "run.overwrite = true"),
        (["train.lrr=1"], "did you mean `train.lr`"),
        (["run.dir=/dev/null/x"], "not writable"),
    ],
)
def test_wrong_settings_are_refused_with_status_2(tmp_path, overrides, words):
    code, _, said = begin(tmp_path / "run", overrides=overrides)
    assert code == 2 and words in said and "fix:" in said


def test_a_run_folder_in_use_by_a_running_job_is_refused(tmp_path):
    run = tmp_path / "run"
    begin(run, job="7")
    code, _, said = begin(run, "8", 0, "--active", "7 9")
    assert code == 2 and "in use by job 7" in said
    assert begin(run, "8", 0, "--active", "9")[0] == 0


def test_the_grid_repeats_temperatures_only_where_they_matter(tmp_path, capsys):
    words = [
        "--objectives",
        "sft,gdrt",
        "--seeds",
        "0,1",
        "--taus",
        "0.5,1",
        "--into",
        str(tmp_path / "sweep"),
    ]
    assert grid.main(words) == 0
    assert [line.split()[1].rpartition("/")[2] for line in capsys.readouterr().out.splitlines()] == [
        "sft-seed0",
        "sft-seed1",
        "gdrt-tau0.5-seed0",
        "gdrt-tau0.5-seed1",
        "gdrt-tau1-seed0",
        "gdrt-tau1-seed1",
    ]
    assert grid.main([*words, "--index", "3", "--", "--config", "a b.yaml", "train.lr=1"]) == 0
    assert shlex.split(capsys.readouterr().out) == [
        "--config",
        "a b.yaml",
        "train.lr=1",
        "objective=gdrt",
        "train.seed=1",
        "dro.tau=0.5",
        f"run.dir={tmp_path}/sweep/gdrt-tau0.5-seed1",
    ]
    assert len((tmp_path / "sweep" / "runs.txt").read_text().splitlines()) == 6
    assert grid.main([*words, "--index", "6"]) == 2
    assert "sbatch --array=0-5" in capsys.readouterr().err


def test_at_the_time_limit_the_job_is_requeued_before_the_ranks_have_ended(tmp_path):
    run = tmp_path / "run"
    begin(run)
    checkpoint(run, 10)
    code, answer, said = call(
        lives.main,
        "end",
        "--job",
        "7",
        "--restart",
        0,
        "--run-dir",
        run,
        "--code",
        75,
        "--state",
        "COMPLETING",
        "--reason",
        "TimeLimit",
        "--early",
    )
    assert (
        answer == {"VERDICT": "requeue", "CODE": "75"}
        and "the time limit is reached; newest checkpoint: step 10" in said
    )


def test_the_script_of_a_life_that_was_cut_off_does_nothing_once_a_newer_life_began(tmp_path):
    run = tmp_path / "run"
    begin(run)
    checkpoint(run, 10)
    begin(run, restart=1)
    before = (run / "logs" / "slurm" / "lives.jsonl").read_text()
    code, answer, said = end(run, 75)
    assert answer == {"VERDICT": "stop", "CODE": "1"} and "life 1 of this job goes on" in said
    assert (run / "logs" / "slurm" / "lives.jsonl").read_text() == before
