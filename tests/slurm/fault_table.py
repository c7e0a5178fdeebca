"""The fault table of the Slurm templates: real training on a simulated cluster, one fault per row, and the
result against an undisturbed run.

    python tests/slurm/fault_table.py [--rows "node killed,preemption"] [--json]        make test-slurm
    runs it (root; about 15 minutes)

Every row must end in a completed job whose metrics.jsonl has each step once and equals the undisturbed
run's. Printed: lives, steps computed twice (at most one checkpoint interval), seconds from the fault to
the next life's start, and the largest difference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cluster import Cluster, Shape, install, why_not
from harness import COMPARED, Site, largest_difference, lives, metrics, status

SAVE_EVERY = 10
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2")


@dataclass
class Row:
    """One fault. `strike(site, job, run)` does it once a checkpoint is there.

    `after` mends the cluster when the job has ended.
    """

    name: str
    strike: Callable[[Site, str, Path], None]
    options: tuple[str, ...] = TWO_NODES
    after: Callable[[Site, str, Path], None] = lambda site, job, run: None
    lives: int = 2  # expected; 1: the fault must not end a life
    prepare: Callable[[Site, Path], None] = lambda site, run: None
    lost_steps: int = SAVE_EVERY  # at most


def nodes_of(site: Site, job: str) -> list[str]:
    return site.cluster.login(
        "scontrol", "show", "hostnames", site.cluster.job(job)["NodeList"]
    ).stdout.split()


def rank_pids(site: Site, node: str, run: Path) -> list[str]:
    """Pids, in the node's process table, of this run's trainers."""
    found = site.cluster.on(
        node, "pgrep", "-f", f"^{re.escape(sys.executable)} .*train.py .*run.dir={run}( |$)", check=False
    ).stdout.split()
    if not found:
        raise AssertionError(f"no rank of {run} runs on {node}")
    return found


def warn(site, job, run):
    site.cluster.login("scancel", "--signal=USR1", "--batch", job)


def minutes_run(site: Site, job: str) -> int:
    parts = [int(p) for p in re.split("[-:]", site.cluster.job(job)["RunTime"])]
    return parts[-3] * 60 + parts[-2]


@contextlib.contextmanager
def frozen(site: Site, job: str, run: Path):
    """Stops the ranks (SIGSTOP) until the block ends.

    The tiny run must not finish while Slurm takes its time.
    """

    def send(name):
        for node, pids in places.items():
            site.cluster.on(node, "kill", f"-{name}", *pids, check=False)

    places = {node: rank_pids(site, node, run) for node in nodes_of(site, job)}
    send("STOP")
    try:
        yield
    finally:
        send("CONT")


def near_time_limit(site, job, run):
    """Slurm itself sends the warning: the limit comes closer than the 300 s of --signal=B:USR1@300."""
    with frozen(site, job, run):
        site.cluster.login("scontrol", "update", f"jobid={job}", f"timelimit={minutes_run(site, job) + 3}")
        site.until(lambda: "asked to stop" in site.log(job), 90, "the warning did not come", job)
    wait_for_life(site, job, 1)
    site.cluster.login("scontrol", "update", f"jobid={job}", "timelimit=60")


def hit_time_limit(site, job, run):
    """The limit itself, without time for a warning: ranks get TERM and KillWait (30 s) to save."""
    with frozen(site, job, run):
        site.cluster.login(
            "scontrol", "update", f"jobid={job}", f"timelimit={max(1, minutes_run(site, job))}"
        )
        site.until(
            lambda: site.cluster.job(job)["JobState"] != "RUNNING", 150, "the time limit did not come", job
        )
    wait_for_life(site, job, 1)
    site.cluster.login("scontrol", "update", f"jobid={job}", "timelimit=60")


def preempt(site, job, run):
    with frozen(site, job, run):
        urgent = site.sbatch(
            "--partition=high", f"--nodes={site.cluster.shape.nodes}", "--exclusive", "--wrap=sleep 3"
        )
        site.until(lambda: "asked to stop" in site.log(job), 60, "the warning did not come", job)
    site.wait(urgent, 240)


def requeue(site, job, run):
    site.cluster.login("scontrol", "requeue", job)


def kill_rank(site, job, run):
    node = nodes_of(site, job)[-1]
    site.cluster.on(node, "kill", "-9", *rank_pids(site, node, run))


def kill_last_node(site, job, run):
    site.victim = nodes_of(site, job)[-1]
    site.cluster.kill_node(site.victim)


def kill_batch_node(site, job, run):
    site.victim = nodes_of(site, job)[0]
    site.cluster.kill_node(site.victim)


def revive(site, job, run):
    site.cluster.start_node(site.victim)
    usable(site)


def cut_network(site, job, run):
    """Both ranks live on the node that is cut.

    They go on alone, as an orphan, while the next life starts elsewhere.
    """
    site.victim = nodes_of(site, job)[0]
    with frozen(site, job, run):
        site.cluster.cut(site.victim)
        site.until(lambda: json.loads((run / "life").read_text())["life"] > 1, 300, "no second life", job)


def heal(site, job, run):
    """The orphan must have been refused: it may publish nothing once the next life began."""
    log = (run / "logs" / "slurm" / f"job_{job}_life_0" / "rank_0.log").read_text(encoding="utf-8")
    site.orphan = "refused" if "was taken over by" in log else "ended before it could publish"
    site.cluster.heal(site.victim)
    usable(site)


def restart_slurmd(site, job, run):
    for node in nodes_of(site, job):
        site.cluster.kill_slurmd(node)
    time.sleep(2)
    for node in nodes_of(site, job):
        site.cluster.start_slurmd(node)


def small_disk(site, run):
    """RUN/checkpoints on the 64 MB file system that was mounted for this row."""
    target = site.folder / "small" / run.name
    target.mkdir(parents=True)
    run.mkdir()
    (run / "logs").mkdir()
    (run / "checkpoints").symlink_to(target)


def fill_disk(site, job, run):
    filler = site.folder / "small" / "filler"
    with open(filler, "wb") as stream:
        try:
            while True:
                stream.write(b"\0" * (1 << 16))
                stream.flush()
        except OSError:
            pass
    site.until(
        lambda: (
            site.cluster.job(job).get("Reason", "").startswith("JobHeld")
            or "held" in site.cluster.job(job).get("Reason", "").lower()
        ),
        120,
        "the job was not held",
        job,
    )
    filler.unlink()
    site.cluster.login("scontrol", "release", job)


ROWS = [
    Row("warning signal", warn, lost_steps=0),
    Row("time limit is near", near_time_limit, lost_steps=0),
    Row("time limit is hit", hit_time_limit),
    Row("preemption", preempt, lost_steps=0),
    Row("requeue by hand", requeue),
    Row("one rank kill -9", kill_rank),
    Row("node killed", kill_last_node, after=revive),
    Row("batch node killed", kill_batch_node, after=revive),
    Row("network cut with old ranks alive", cut_network, ONE_NODE, after=heal),
    Row("slurmd restarted", restart_slurmd, lives=1, lost_steps=0),
    Row("checkpoint disk full", fill_disk, prepare=small_disk),
]


def begins(run: Path) -> list[dict]:
    return [event for event in lives(run) if event["event"] == "begin"]


def wait_for_life(site: Site, job: str, restart: int, seconds: float = 240) -> None:
    site.until(
        lambda: int(site.cluster.job(job).get("Restarts", 0)) >= restart,
        seconds,
        f"life {restart} did not come",
        job,
    )


def usable(site: Site) -> None:
    """All nodes idle again, whatever a fault left them in."""

    def ready():
        lines = site.cluster.login(
            "sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False
        ).stdout.split("\n")
        bad = [
            line.split()[0]
            for line in lines
            if line and line.split()[1] not in ("idle", "mixed", "allocated", "completing")
        ]
        for node in bad:
            site.cluster.resume(node)
        return not bad

    site.until(ready, 120, "the nodes did not come back")


def newest_step(run: Path) -> int:
    return max(
        (
            int(p.parent.name.removeprefix("step_"))
            for p in (run / "checkpoints").glob("step_*/manifest.json")
        ),
        default=0,
    )


def last_logged_step(run: Path) -> int:
    return max(metrics(run), default=0) if (run / "metrics.jsonl").is_file() else 0


def play(site: Site, row: Row, undisturbed: dict[int, dict]) -> dict:
    """One row: start, wait for the first checkpoint, strike, wait for the end, compare."""
    run = site.run(re.sub(r"\W+", "_", row.name))
    row.prepare(site, run)
    site.orphan = ""
    started = time.monotonic()
    job = site.train(run.name, *row.options)
    site.until(lambda: newest_step(run) >= SAVE_EVERY, 300, "no checkpoint came", job)
    struck, struck_at_step = time.time(), last_logged_step(run)
    row.strike(site, job, run)
    state = site.wait(job, 600)
    row.after(site, job, run)
    starts = begins(run)
    reached = max(
        [struck_at_step, *(e["step"] for e in lives(run) if e["event"] == "end" and e["restart"] == 0)]
    )
    lost = max(0, reached - starts[1]["step"]) if len(starts) > 1 else 0
    result = {
        "row": row.name,
        "state": state,
        "status": status(run),
        "lives": len(starts),
        "struck_at_step": struck_at_step,
        "steps_twice": lost,
        "wait_s": round(starts[1]["time"] - struck, 1) if len(starts) > 1 else 0.0,
        "total_s": round(time.monotonic() - started, 1),
        "largest_difference": largest_difference(metrics(run), undisturbed),
        "note": site.orphan,
    }
    result["ok"] = (
        state == "COMPLETED"
        and result["status"] == "completed"
        and result["lives"] == row.lives
        and lost <= row.lost_steps
        and result["largest_difference"] == 0.0
    )
    if not result["ok"]:
        result["log"] = site.log(job)[-6000:]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="", help="comma-separated names; default: all")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--keep", action="store_true", help="keep runs and logs, and say where")
    args = parser.parse_args()
    wanted = [name.strip() for name in args.rows.split(",") if name.strip()]
    rows = [row for row in ROWS if not wanted or row.name in wanted]
    if len(wanted) > len(rows):
        parser.error(f"unknown row; rows: {'; '.join(row.name for row in ROWS)}")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # leave through the finally blocks: there is a mount to undo
    install()
    reason = why_not()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="gdrt-faults-"))
    folder.chmod(0o755)
    runs = folder / "runs"
    (runs / "small").mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(runs / "small")], check=True
    )  # before the nodes: they inherit it
    results = []
    try:
        with Cluster(folder / "cluster", Shape(nodes=3, kill_wait_s=30)) as cluster:
            site = Site(cluster, runs)
            calm = {}
            for options in (TWO_NODES, ONE_NODE):  # both layouts are two ranks: the same arithmetic
                if any(row.options == options for row in rows):
                    started = time.monotonic()
                    job = site.train(f"undisturbed_{len(calm)}", *options)
                    if site.wait(job, 600) != "COMPLETED":
                        raise RuntimeError(f"the undisturbed run failed:\n{site.log(job)[-6000:]}")
                    calm[options] = metrics(site.run(f"undisturbed_{len(calm)}"))
                    if not args.json:
                        print(
                            f"undisturbed, {' '.join(options)}: {len(calm[options])} steps in "
                            f"{time.monotonic() - started:.0f} s; compared: {', '.join(COMPARED)}",
                            flush=True,
                        )
            if not args.json:
                print(
                    f"{'fault':30} {'result':9} {'lives':>5} {'at step':>7} {'steps twice':>11} "
                    f"{'wait s':>7} {'total s':>8} {'difference':>10}",
                    flush=True,
                )
            for row in rows:
                try:
                    result = play(site, row, calm[row.options])
                except (TimeoutError, AssertionError, RuntimeError, OSError) as error:
                    result = {"row": row.name, "ok": False, "log": f"{type(error).__name__}: {error}"}
                results.append(result)
                print(json.dumps(result) if args.json else line(result), flush=True)
                site.cancel_all()
                usable(site)
    finally:
        subprocess.run(["umount", str(runs / "small")], check=False)
        if args.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if all(result["ok"] for result in results) else 1


def line(result: dict) -> str:
    if "lives" not in result:
        return f"{result['row']:30} FAILED    {result['log']}"
    text = (
        f"{result['row']:30} {'completed' if result['ok'] else 'FAILED':9} {result['lives']:>5} "
        f"{result['struck_at_step']:>7} {result['steps_twice']:>11} "
        f"{result['wait_s']:>7.1f} {result['total_s']:>8.1f} {result['largest_difference']:>10.1e}  "
        f"{result['note']}"
    )
    return (
        text
        if result["ok"]
        else f"{text}\n{json.dumps({k: v for k, v in result.items() if k != 'log'})}\n{result['log']}"
    )


if __name__ == "__main__":
    sys.exit(main())
