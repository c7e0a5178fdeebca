"""Real training under the templates, against the same run in one process. The first test belongs to `make
test`; the others are marked `faults` and run with `make test-slurm`.
"""

from __future__ import annotations

import json

import pytest
from harness import largest_difference, lives, metrics, single_process, status
from test_submit import ids, submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]  # minutes where other work shares the cores
STEP = 10  # train.save_every of the tiny config


@pytest.fixture(scope="module")
def alone(site):
    """metrics.jsonl of the undisturbed run: one rank, one process, no Slurm."""
    run = site.run("alone")
    single_process(site.config, run)
    return metrics(run)


def same_losses(one, other):
    return max(abs(one[step]["loss"] - other[step]["loss"]) for step in one)


def test_two_nodes_warned_and_requeued_compute_what_one_process_computes(site, alone):
    job = site.train("two_nodes", "--nodes=2", "--gpus-per-node=1")  # one rank per (simulated) GPU
    run = site.run("two_nodes")
    site.until(
        lambda: (run / "checkpoints" / f"step_{STEP}" / "manifest.json").is_file(),
        300,
        "no checkpoint came",
        job,
    )
    site.cluster.login("scancel", "--signal=USR1", "--batch", job)
    assert site.wait(job, 400) == "COMPLETED", site.log(job)
    log = site.log(job)
    assert status(run) == "completed" and (run / "adapter" / "adapter_model.safetensors").is_file()
    assert "2 rank(s) on 2 node(s)" in log and "1 GPU(s) per node" in log and "rendezvous node" in log

    events = lives(run)
    assert [event["event"] for event in events] == ["begin", "end", "begin", "end"]
    assert (
        events[1]["verdict"] == "requeue"
        and events[1]["code"] == 75
        and events[2]["step"] == events[1]["step"] >= STEP
    )
    assert "asked to stop" in log and f"from checkpoint step {events[1]['step']}" in log
    for rank in range(2):
        assert (run / "logs" / "slurm" / f"job_{job}_life_1" / f"rank_{rank}.log").stat().st_size > 0

    found = metrics(run)
    assert sorted(found) == sorted(alone) == list(range(1, 41))
    assert same_losses(found, alone) < 1e-5
    for step in found:
        assert (
            max(
                abs(a - b)
                for a, b in zip(found[step]["group_weight"], alone[step]["group_weight"])
                if a is not None
            )
            < 1e-5
        )

    again = site.train("two_nodes", "--nodes=1")
    assert site.wait(again, 60) == "COMPLETED" and "is a finished run: nothing to do" in site.log(again)


@pytest.mark.faults
def test_three_nodes_and_four_simulated_gpus_compute_what_one_process_computes(site, alone):
    three = site.train("three_nodes", "--nodes=3")
    assert site.wait(three, 400) == "COMPLETED", site.log(three)
    four = site.train("four_gpus", "--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2")
    assert site.wait(four, 400) == "COMPLETED", site.log(four)
    assert "4 rank(s) on 2 node(s)" in site.log(four)
    for name in ("three_nodes", "four_gpus"):
        assert same_losses(metrics(site.run(name)), alone) < 1e-5, name


@pytest.mark.faults
def test_the_plan_refuses_more_ranks_than_the_batch_before_any_rank_starts(site):
    job = site.train("too_many", "--nodes=2", "--ntasks-per-node=8", env={"GDRT_PLAN": "1"})
    assert site.wait(job, 200) == "FAILED" and site.cluster.job(job)["ExitCode"] == "2:0"
    log = site.log(job)
    assert "train.global_batch = 12 is smaller than the 16 ranks" in log and "use at most 12 ranks" in log
    assert not list(site.run("too_many").glob("logs/slurm/*/rank_*.log"))


@pytest.mark.faults
def test_a_cancelled_training_stays_cancelled_and_a_new_job_goes_on(site, alone):
    run = site.run("cancelled")
    job = site.train("cancelled", "--nodes=2")
    site.until(
        lambda: (run / "checkpoints" / f"step_{STEP}" / "manifest.json").is_file(),
        300,
        "no checkpoint came",
        job,
    )
    site.cluster.login("scancel", job)
    assert site.wait(job, 120) == "CANCELLED"
    second = site.train("cancelled", "--nodes=2")
    assert site.wait(second, 300) == "COMPLETED", site.log(second)
    assert same_losses(metrics(run), alone) < 1e-5


@pytest.mark.faults
def test_a_chain_trains_evaluates_on_two_ranks_and_compares_through_a_requeue(site):
    run = site.run("chain")
    submit(
        site,
        "--config",
        site.config,
        "--ntasks-per-node",
        2,
        "--eval-args=--limit 12 --bootstrap 200",
        f"run.dir={run}",
        env={"GDRT_PLAN": "0"},
    )
    jobs = ids(run)
    site.until(
        lambda: (run / "checkpoints" / f"step_{STEP}" / "manifest.json").is_file(),
        300,
        "no checkpoint came",
        jobs["train"],
    )
    _, words, _ = submit(site, "--status", run)
    assert (
        "at train" in words and "runs on node" in words and "waits for train" in words and ", step 1" in words
    )
    site.cluster.login("scancel", "--signal=USR1", "--batch", jobs["train"])
    states = {name: site.wait(job, 600) for name, job in jobs.items()}
    logs = {name: (run / "logs" / "slurm" / f"{name}-{job}.log").read_text() for name, job in jobs.items()}
    assert set(states.values()) == {"COMPLETED"}, {
        name: logs[name][-3000:] for name in jobs if states[name] != "COMPLETED"
    }
    tuned, base = run / "eval" / "test-renormalised-limit12", run / "eval" / "test-renormalised-limit12-base"
    for folder in (tuned, base):
        results = json.loads((folder / "results.json").read_text())
        assert results["metrics"]["ndcg@10"]["n"] == 12
    assert (run / "comparison" / "compare.html").is_file()
    _, words, _ = submit(site, "--status", run)
    assert "finished" in words and "life 2 after 1 requeue(s)" in words and "compare.html" in words


@pytest.mark.faults
def test_preparation_fills_the_cache_that_training_reads(site, alone):
    run = site.run("prepared")
    first = site.script(
        "prepare.sh",
        "--nodes=1",
        "--ntasks-per-node=2",
        arguments=["--config", str(site.config), f"run.dir={run}"],
    )
    assert site.wait(first, 300) == "COMPLETED", site.log(first)
    job = site.train("prepared", "--nodes=1", "--ntasks-per-node=2")
    assert site.wait(job, 300) == "COMPLETED", site.log(job)
    assert "from the cache" in site.log(job) and same_losses(metrics(run), alone) < 1e-5


@pytest.mark.faults
def test_a_sweep_trains_every_cell_of_its_grid(site, alone):
    into = site.folder / "sweep"
    job = site.sbatch(
        "--array=0-1%1",
        f"--output={site.folder}/sweep-%a.log",
        str(site.home / "slurm" / "sweep.sh"),
        "--objectives",
        "sft,gdrt",
        "--into",
        str(into),
        "--",
        "--config",
        str(site.config),
        env={"GDRT_PLAN": "0"},
    )
    for task in range(2):
        assert site.wait(f"{job}_{task}", 400) == "COMPLETED", (site.folder / f"sweep-{task}.log").read_text()
    assert same_losses(metrics(into / "gdrt-seed0"), alone) < 1e-5
    assert largest_difference(metrics(into / "sft-seed0"), alone) > 1e-3, "sft is another objective"
    evaluation = site.sbatch(
        "--array=0-1",
        str(site.home / "slurm" / "eval.sh"),
        "--runs",
        str(into / "runs.txt"),
        "--limit",
        "4",
        "--bootstrap",
        "100",
    )
    for task in range(2):
        assert site.wait(f"{evaluation}_{task}", 400) == "COMPLETED"
    assert all(
        (into / name / "eval" / "test-renormalised-limit4" / "results.json").is_file()
        for name in ("sft-seed0", "gdrt-seed0")
    )
