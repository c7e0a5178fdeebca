"""submit.py: chains of jobs, what it refuses, and what --status says about them.

No training is needed for any of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from harness import HOME

from eval.pipeline import default_output as catalogue_output
from eval.predictions.options import ScoringOptions
from eval.rows.pipeline import default_output as rows_output

SUBMIT = str(HOME / "slurm" / "submit.py")


def submit(site, *words, check=True, env=None):
    """Runs submit.py on the login node; (exit status, stdout, stderr)."""
    done = site.cluster.login(
        sys.executable, SUBMIT, *map(str, words), check=False, env=site.environment(env), cwd=site.folder
    )
    if check and done.returncode:
        raise AssertionError(f"submit.py {words}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.returncode, done.stdout, done.stderr


def queue(site):
    return set(site.cluster.login("squeue", "-h", "-r", "-o", "%A").stdout.split())


def ids(run_or_into):
    record = next(
        p for p in (run_or_into / "logs" / "slurm" / "chain.json", run_or_into / "chain.json") if p.is_file()
    )
    return {job["name"]: job["id"] for job in json.loads(record.read_text())["jobs"]}


@pytest.mark.slurm
def test_a_dry_run_shows_every_command_and_script_and_submits_nothing(site):
    before = queue(site)
    _, text, _ = submit(
        site,
        "--config",
        site.config,
        "--nodes",
        2,
        "--gpus-per-node",
        "h100:2",
        "--partition",
        "main",
        "--time",
        "01:00:00",
        "--dry-run",
        f"run.dir={site.run('dry')}",
        "dro.tau=0.5",
    )
    commands = [line for line in text.splitlines() if line.startswith("sbatch ")]
    assert [
        next(part for part in line.split() if "/slurm/" in part and part.endswith(".sh")).rpartition("/")[2]
        for line in commands
    ] == ["gdrt.sh", "eval.sh", "eval.sh", "compare.sh"]
    assert (
        "--nodes=2 --ntasks-per-node=2 --gpus-per-node=h100:2 --cpus-per-task=8 --time=01:00:00"
        in commands[0]
        and "dro.tau=0.5" in commands[0]
    )
    assert "--dependency=afterok:<train>" in commands[1] and "--kill-on-invalid-dep=yes" in commands[1]
    assert "'--dependency=afterok:<evaluate>:<evaluate-base>'" in commands[3]
    for script in ("gdrt.sh", "eval.sh", "compare.sh", "common.sh", "rank.sh"):
        assert (HOME / "slurm" / script).read_text().strip() in text
    assert queue(site) == before and not site.run("dry").exists()


@pytest.mark.slurm
def test_a_chain_whose_training_fails_cancels_the_rest_and_says_why(site):
    breaks = site.folder / "breaks.sh"
    breaks.write_text("echo 'error: the licence server is down' >&2; exit 3\n")
    run = site.run("chain_broken")
    _, text, _ = submit(site, "--config", site.config, f"run.dir={run}", env={"GDRT_SETUP": str(breaks)})
    jobs = ids(run)
    assert list(jobs) == ["train", "evaluate", "evaluate-base", "compare"]
    assert all(f"job {number}" in text for number in jobs.values()) and f"--status {run}" in text
    assert site.wait(jobs["train"]) == "FAILED"
    site.until(
        lambda: not queue(site) & set(jobs.values()),
        60,
        "the jobs that wait for a failed one were not cancelled",
    )
    code, words, _ = submit(site, "--status", run, check=False)
    assert code == 1 and "broken at train" in words
    assert "failed with exit status 3: the licence server is down (log: " in words
    assert (
        "cancelled, because train did not succeed" in words
        and "cancelled, because evaluate and evaluate-base did not succeed" in words
    )
    assert [site.cluster.job(number)["JobState"] for number in jobs.values()] == [
        "FAILED",
        "CANCELLED",
        "CANCELLED",
        "CANCELLED",
    ]


@pytest.mark.slurm
def test_status_follows_a_chain_that_waits_and_a_second_one_is_refused(site):
    run = site.run("chain_held")
    submit(site, "--config", site.config, "--sbatch=--hold", "--no-base", f"run.dir={run}")
    jobs = ids(run)
    assert list(jobs) == ["train", "evaluate"], "one evaluation has nothing to be compared with"
    code, words, _ = submit(site, "--status", run)
    assert "at train" in words and f"is held: `scontrol release {jobs['train']}`" in words
    code, _, complaint = submit(site, "--config", site.config, f"run.dir={run}", check=False)
    assert (
        code == 2
        and "belongs to a chain that still lives" in complaint
        and f"scancel {jobs['train']}" in complaint
    )
    site.cluster.login("scancel", *jobs.values())
    site.until(lambda: not queue(site) & set(jobs.values()), 30, "scancel did not end the chain")
    code, words, _ = submit(site, "--status", run, check=False)
    assert code == 1 and "cancelled by a user or the administrators" in words


@pytest.mark.slurm
def test_a_failed_task_of_a_grid_is_named_and_its_evaluation_does_not_run(site):
    breaks = (
        site.folder / "breaks_one.sh"
    )  # the second run of the grid fails at once, the first is held up until the test has looked
    breaks.write_text(
        'if [ "${SLURM_ARRAY_TASK_ID:-}" = 1 ]; then echo "error: no luck" >&2; exit 3; fi\nsleep 300\n'
    )
    into = site.folder / "grid"
    _, text, _ = submit(
        site,
        "--config",
        site.config,
        "--seeds",
        "0,1,2",
        "--at-once",
        2,
        "--into",
        into,
        env={"GDRT_SETUP": str(breaks)},
    )
    jobs = ids(into)
    assert "tasks 0-2%2" in text and (into / "runs.txt").read_text().splitlines() == [
        str(into / f"gdrt-seed{seed}") for seed in range(3)
    ]
    site.until(
        lambda: site.cluster.job(f"{jobs['train']}_1").get("JobState") == "FAILED", 60, "task 1 did not fail"
    )
    site.until(
        lambda: site.cluster.job(f"{jobs['evaluate']}_1").get("JobState") == "CANCELLED",
        60,
        "the evaluation of the failed run was not cancelled",
    )
    _, words, _ = submit(site, "--status", into, check=False)
    assert "1 failed, 2 running; failed tasks: 1" in words
    assert site.cluster.job(f"{jobs['evaluate']}_0").get("JobState") == "PENDING"
    site.cluster.login("scancel", *jobs.values())
    site.until(lambda: not queue(site), 60, "scancel did not end the grid")


@pytest.mark.slurm
@pytest.mark.parametrize(
    "words, problem, fix",
    [
        (
            ["--partition", "gpus"],
            "--partition gpus: this cluster has no such partition",
            "partitions here: high, main",
        ),
        (
            ["--nodes", 4, "--gpus-per-node", 4],
            "4 node(s) x 4 = 16 ranks, but train.global_batch = 12",
            "use at most 12 ranks",
        ),
        (["run.dir=/dev/null/run"], "run.dir = /dev/null/run: not writable", "choose another folder"),
        (["--gpus-per-node", "four"], "--gpus-per-node four: expected N or TYPE:N", "h100:8"),
        (["--gpus-per-node", 4, "--ntasks-per-node", 2], "one rank per GPU", "leave --ntasks-per-node out"),
        (["--compare-with", "/nowhere"], "--compare-with /nowhere: not an evaluation folder", "eval.run"),
        (["train.lrr=1"], "unknown key `train.lrr`; did you mean `train.lr`?", ""),
        (["--sbatch=--mem=9000G"], "sbatch refused: Batch job submission failed", "the command was"),
        (["--eval-args=--output x"], "--eval-args --output", "leave --output out"),
    ],
)
def test_submit_refuses_what_a_job_would_fail_on(site, words, problem, fix):
    before = queue(site)
    code, _, complaint = submit(
        site, "--config", site.config, f"run.dir={site.folder}/refused", *words, check=False
    )
    assert code == 2 and problem in complaint and fix in complaint
    site.until(lambda: queue(site) <= before, 30, "a refused chain left jobs behind")


def test_without_slurm_the_message_says_where_to_run_it(tmp_path):
    done = subprocess.run(
        [sys.executable, SUBMIT, "--config", str(HOME / "configs" / "smoke.yaml"), f"run.dir={tmp_path}/run"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert (
        done.returncode == 2
        and "the command `sbatch` is not on this machine" in done.stderr
        and "deepspeed gdrt_ds/train.py" in done.stderr
    )


@pytest.mark.parametrize("given", ["data.format=sft", "data.format=auto"])
def test_a_chain_on_rows_compares_the_folders_that_their_evaluations_write(tmp_path, given):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    run = tmp_path / "run"
    done = dry_run(given, f"data.path={rows}", f"run.dir={run}")
    assert done.returncode == 0, done.stderr
    compared = next(line for line in done.stdout.splitlines() if "slurm/compare.sh" in line).split()
    for base in (True, False):
        model = SimpleNamespace(adapter=None if base else run / "adapter")
        subject = SimpleNamespace(run=run, name="run", model=model, split="test", limit=None)
        assert str(rows_output(subject)) in compared
    done = dry_run("data.format=sft", f"data.path={rows}", f"run.dir={run}", "--eval-args=--mode beam")
    assert (
        done.returncode == 2
        and "--eval-args --mode beam: rows of prompt and completion have no catalogue" in done.stderr
    )


@pytest.mark.parametrize(
    "words, options",
    [
        ("", {}),
        ("--mode full --limit 7", {"mode": "full"}),
        ("--mode full --scoring full", {"mode": "full"}),
        ("--mode beam", {"mode": "beam", "scoring": "renormalised"}),
        ("--mode beam --scoring full", {"mode": "beam", "scoring": "full"}),
    ],
)
def test_a_chain_compares_the_folders_that_evaluations_of_a_catalogue_write(tmp_path, words, options):
    run = tmp_path / "run"
    done = dry_run("data.path=planted", f"run.dir={run}", f"--eval-args={words}")
    assert done.returncode == 0, done.stderr
    compared = next(line for line in done.stdout.splitlines() if "slurm/compare.sh" in line).split()
    for base in (True, False):
        recommender = SimpleNamespace(adapter=None if base else run / "adapter")
        limit = 7 if "--limit" in words else None
        subject = SimpleNamespace(run=run, name="run", recommender=recommender, split="test", limit=limit)
        assert str(catalogue_output(subject, ScoringOptions(**options))) in compared


def test_a_chain_whose_evaluations_would_be_refused_is_refused(tmp_path):
    run = tmp_path / "run"
    done = dry_run("data.path=planted", f"run.dir={run}", "--eval-args=--scoring full")
    assert done.returncode == 2 and "use --mode full" in done.stderr


def test_the_plan_is_of_the_engine_that_the_job_runs(tmp_path):
    words = [
        "data.path=planted",
        f"run.dir={tmp_path / 'run'}",
        "model.lora.dora=true",
        "model.dtype=auto",
        "--plan",
        "--gpu-memory=80",
    ]
    refused = dry_run(*words, "--deepspeed_config", "ds_configs/zero3_qlora.json")
    assert refused.returncode == 2 and "model.lora.dora = true with ZeRO stage 3" in refused.stderr
    planned = dry_run(*words, "--deepspeed_config", "ds_configs/zero1.json")
    assert planned.returncode == 0, planned.stderr
    assert "DeepSpeed ZeRO stage 1" in planned.stdout and "the device has 80.00 GiB" in planned.stdout
    missing = dry_run(*words[:2], "--deepspeed_config", "ds_configs/nope.json")
    assert missing.returncode == 2 and "ds_configs/nope.json" in missing.stderr


def dry_run(*words) -> subprocess.CompletedProcess:
    config = str(HOME / "configs" / "smoke.yaml")
    return subprocess.run(
        [sys.executable, SUBMIT, "--config", config, "--dry-run", *words], capture_output=True, text=True
    )


def test_status_of_a_folder_without_a_chain_is_an_error(tmp_path):
    done = subprocess.run([sys.executable, SUBMIT, "--status", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "no chain was submitted for this folder" in done.stderr
