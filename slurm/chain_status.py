"""Where a chain is, in words: `submit.py --status`.

scontrol knows the jobs that Slurm remembers and sacct older ones; the run folder says why something ended.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from chain import Chain, Job, known, load

from gdrt_ds.errors import UserError
from gdrt_ds.files import read_summary

WAITING = {
    "Resources": "waits for free nodes",
    "Priority": "waits for its turn (other jobs come first)",
    "BeginTime": "was requeued and starts again soon",
    "JobHeldUser": "is held: `scontrol release {id}` lets it go",
    "JobHeldAdmin": "is held by the administrators",
    "None": "is about to be scheduled",
    "ReqNodeNotAvail": "waits for nodes that are down or reserved",
    "JobArrayTaskLimit": "waits until another task of the array ends",
    "DependencyNeverSatisfied": "can never start: a job it waits for failed",
    "Nodes_required_for_job_are_DOWN": "waits for nodes that are down",
}
ENDED = {
    "TIMEOUT": "hit its time limit",
    "NODE_FAIL": "lost a node and was not requeued",
    "OUT_OF_MEMORY": "ran out of memory",
    "PREEMPTED": "was evicted",
    "BOOT_FAIL": "failed to boot a node",
    "DEADLINE": "missed its deadline",
}
GOOD = {"COMPLETED"}
ALIVE = {
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "SUSPENDED",
    "REQUEUED",
    "RESIZING",
    "STAGE_OUT",
}


def report(folder: Path) -> tuple[str, bool]:
    """Returns (text, broken) for a run folder or the folder of a grid.

    Raises:
        UserError: no chain was submitted from that folder.
    """
    places = [folder / "logs" / "slurm" / "chain.json", folder / "chain.json", folder]
    record = next((p for p in places if p.is_file()), None)
    if record is None:
        raise UserError(
            f"--status {folder}: no chain was submitted for this folder",
            "give the run.dir (or --into folder) of the submission",
        )
    chain = load(record)
    states: dict[str, list[dict[str, str]]] = {job.name: records(job) for job in chain.jobs}
    kinds = {name: kind([r["JobState"] for r in found]) for name, found in states.items()}
    width = max(len(job.name) for job in chain.jobs)
    lines = [f"chain of {chain.folder}: {verdict(kinds)}"]
    for job in chain.jobs:
        lines.append(f"  {job.name:{width}}  job {job.id:>5}  {words(chain, job, states, kinds)}")
    if kinds.get("compare") == "done":
        lines.append(f"  the comparison: {Path(chain.folder) / 'comparison' / 'compare.html'}")
    return "\n".join(lines), "broken" in kinds.values()


def records(job: Job) -> list[dict[str, str]]:
    """Returns one dict with JobState and more per array task."""
    found = known(job.id)
    return found or from_accounting(job.id) or [{"JobState": "FORGOTTEN"}]


def from_accounting(job_id: str) -> list[dict[str, str]]:
    """Returns what sacct knows of a job that Slurm itself has forgotten; empty without accounting."""
    if shutil.which("sacct") is None:
        return []
    fields = ["State", "ExitCode", "RunTime", "NodeList"]
    done = subprocess.run(
        ["sacct", "-n", "-P", "-X", "-j", job_id, "-o", "State,ExitCode,Elapsed,NodeList"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return []
    rows = [dict(zip(fields, line.split("|"))) for line in done.stdout.splitlines() if line.count("|") == 3]
    return [{"JobState": row["State"].split()[0], **row} for row in rows]


def kind(states: list[str]) -> str:
    """Returns done, alive, broken or forgotten, for a job or all tasks of an array."""
    if all(state in GOOD for state in states):
        return "done"
    if any(state in ALIVE for state in states):
        return "alive"
    if set(states) == {"FORGOTTEN"}:
        return "forgotten"
    return "broken"


def verdict(kinds: dict[str, str]) -> str:
    """Returns where the chain is, in a few words."""
    if all(k == "done" for k in kinds.values()):
        return "finished"
    broken = [name for name, k in kinds.items() if k == "broken"]
    if broken:
        return f"broken at {broken[0]}"
    alive = [name for name, k in kinds.items() if k == "alive"]
    if alive:
        return f"at {alive[0]}"
    return "Slurm no longer remembers its jobs"


def words(chain: Chain, job: Job, states: dict[str, list[dict[str, str]]], kinds: dict[str, str]) -> str:
    found = states[job.name]
    if len(found) == 1:
        return one(chain, job, found[0], kinds)
    counts: dict[str, int] = {}
    for record in found:
        for state in [record["JobState"].lower()] * tasks_in(record):
            counts[state] = counts.get(state, 0) + 1
    text = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    failed = [r.get("ArrayTaskId", "?") for r in found if kind([r["JobState"]]) == "broken"]
    if failed:
        text += f"; failed tasks: {', '.join(failed)} (logs: {job.log.replace('%A', job.id)})"
    return f"array: {text}"


def tasks_in(record: dict[str, str]) -> int:
    """Counts the array tasks of a record: pending ones share one, e.g. ArrayTaskId=2-5%2."""
    count = 0
    for part in record.get("ArrayTaskId", "0").partition("%")[0].split(","):
        ends = re.findall(r"\d+", part)
        count += int(ends[1]) - int(ends[0]) + 1 if len(ends) == 2 else 1
    return count


def one(chain: Chain, job: Job, record: dict[str, str], kinds: dict[str, str]) -> str:
    """Returns the state of one job, or of one task of an array, in words."""
    state = record["JobState"]
    reason = record.get("Reason", "None")
    restarts = int(record.get("Restarts", 0))
    lives = f", life {restarts + 1} after {restarts} requeue(s)" if restarts else ""
    log = job.log.replace("%j", job.id).replace("%A", job.id)
    if state == "PENDING":
        if reason == "Dependency":
            return f"waits for {' and '.join(job.after)}"
        return WAITING.get(reason, f"waits ({reason})").format(id=job.id) + lives
    if state in ALIVE:
        return (
            f"{'ends' if state == 'COMPLETING' else 'runs'} on {record.get('NodeList')} since "
            f"{record.get('RunTime')}{lives}{progress(chain, job)}"
        )
    if state in GOOD:
        return f"succeeded in {record.get('RunTime')}{lives}"
    if state == "FORGOTTEN":
        return "Slurm no longer remembers it" + (
            f"; the run is {summary(chain)}" if job.name == "train" else ""
        )
    failed_before = [name for name in job.after if kinds.get(name) == "broken"]
    if state == "CANCELLED" and failed_before:
        return f"cancelled, because {' and '.join(failed_before)} did not succeed"
    if state == "CANCELLED":
        return f"cancelled by a user or the administrators{lives}; {last_words(chain, job) or 'log: ' + log}"
    if state == "FAILED":
        code = record.get("ExitCode", "?").partition(":")[0]
        return f"failed with exit status {code}{lives}: {last_words(chain, job) or 'log: ' + log}"
    return f"{ENDED.get(state, state.lower())}{lives}; {last_words(chain, job) or 'log: ' + log}"


def summary(chain: Chain) -> str:
    return read_summary(chain.runs[0]).get("status", "unfinished")


def progress(chain: Chain, job: Job) -> str:
    """Returns the last step of metrics.jsonl, for a training."""
    path = Path(chain.runs[0]) / "metrics.jsonl"
    if job.name != "train" or job.array or not path.is_file():
        return ""
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - 65536))
        steps = re.findall(rb'"step": (\d+)', stream.read())
    return f", step {int(steps[-1])}" if steps else ""


def last_words(chain: Chain, job: Job) -> str:
    """Says why it ended: the `error:` lines of the job's log, or the last entry of the run's lives."""
    log = Path(job.log.replace("%j", job.id))
    if log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-400:]
        errors = [line for line in lines if line.startswith("error: ")]
        if errors:
            return f"{errors[-1].removeprefix('error: ')} (log: {log})"
        ends = [line for line in lines if line.startswith("gdrt: ")]
        if ends:
            return f"{ends[-1].removeprefix('gdrt: ')} (log: {log})"
    return ""
