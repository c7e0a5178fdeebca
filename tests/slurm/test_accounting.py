"""A cluster with accounting.

--status agrees with sacct, also about jobs that the controller has forgotten.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import pytest
from cluster import Cluster, Shape, why_not
from harness import Site
from test_submit import ids, submit


@pytest.fixture(scope="module")
def accounted():
    reason = why_not()
    if reason is None and (shutil.which("slurmdbd") is None or shutil.which("mariadbd") is None):
        reason = "accounting needs slurmdbd and mariadb (cluster.py install --accounting)"
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="gdrt-acct-"))
    folder.chmod(0o755)
    (folder / "runs").mkdir()
    try:
        with Cluster(folder / "cluster", Shape(nodes=1, accounting=True, forget_s=5)) as cluster:
            yield Site(cluster, folder / "runs")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slurm
@pytest.mark.faults
def test_status_agrees_with_sacct_and_outlives_the_controllers_memory(accounted):
    site = accounted
    breaks = site.folder / "breaks.sh"
    breaks.write_text("echo 'error: no luck' >&2; exit 3\n")
    run = site.run("chain")
    submit(site, "--config", site.config, f"run.dir={run}", env={"GDRT_SETUP": str(breaks)})
    jobs = ids(run)

    def accounting():
        rows = site.cluster.login(
            "sacct", "-n", "-P", "-X", "-j", ",".join(jobs.values()), "-o", "JobID,State"
        ).stdout.split("\n")
        return {row.split("|")[0]: row.split("|")[1].split()[0] for row in rows if "|" in row}

    site.until(
        lambda: set(accounting().values()) == {"FAILED", "CANCELLED"},
        90,
        "the chain did not end in the accounting",
    )
    assert accounting() == {
        jobs["train"]: "FAILED",
        jobs["evaluate"]: "CANCELLED",
        jobs["evaluate-base"]: "CANCELLED",
        jobs["compare"]: "CANCELLED",
    }
    code, early, _ = submit(site, "--status", run, check=False)
    assert code == 1 and "broken at train" in early and early.count("cancelled, because") == 3
    site.until(lambda: not site.cluster.job(jobs["train"]), 180, "the controller did not forget the job")
    time.sleep(1)
    code, late, _ = submit(site, "--status", run, check=False)
    assert (
        code == 1
        and "broken at train" in late
        and "failed with exit status 3: no luck" in late
        and late.count("cancelled, because") == 3
    )
