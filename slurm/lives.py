"""The lives of a job that is requeued: whether the next one may begin, and what follows from the end of one.

gdrt.sh asks `begin` before it starts the ranks and `end` after they ended. `look` only checks
settings and run folder (prepare.sh).

    python slurm/lives.py begin --job 12 --restart 0 -- --config configs/x.yaml run.dir=runs/x
    python slurm/lives.py look -- --config configs/x.yaml run.dir=runs/x
    python slurm/lives.py end --job 12 --restart 0 --run-dir runs/x --code 75 --state RUNNING --reason None

What happened is explained on stderr and kept in RUN/logs/slurm/lives.jsonl. The answer on stdout is
shell assignments: VERDICT is start or finished (begin, look), done, requeue, hold or stop (end).
Exit status 2 is the user's mistake, 1 means that there are no more lives.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
if (HOME / "gdrt_ds").is_dir():  # a checkout; beside an installed wheel the folder is the user's
    sys.path.insert(0, str(HOME))

from gdrt_ds.config import load_config  # noqa: E402
from gdrt_ds.errors import EXIT_INTERRUPTED, LostPeer, StorageError, UserError  # noqa: E402
from gdrt_ds.files import read_summary  # noqa: E402

STATUSES = {
    137: "killed by signal 9: often out of memory, see `sacct -o MaxRSS` or the node's kernel log",
    139: "segmentation fault",
    134: "aborted",
    LostPeer.status: "it hung, or a peer did; the stacks are in RUN/logs",
    143: "killed by signal 15",
}


def say(text: str) -> None:
    """Prints a line on stderr; stdout is the answer to the shell."""
    print(f"gdrt: {text}", file=sys.stderr, flush=True)


class Lives:
    """RUN/logs/slurm/lives.jsonl: one line per begin and end of a life, by job."""

    def __init__(self, run_dir: Path, job: str):
        self.run_dir = run_dir
        self.job = job
        self.path = run_dir / "logs" / "slurm" / "lives.jsonl"

    def events(self, event: str) -> list[dict]:
        """Returns the events of this job, oldest first; a half-written line (node died) is passed over."""
        found = []
        if not self.path.is_file():
            return found
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [e for e in found if e["event"] == event and (e["job"] == self.job or not self.job)]

    def write(self, event: str, **fields) -> None:
        """Adds a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(
                json.dumps({"event": event, "job": self.job, "time": round(time.time(), 2), **fields}) + "\n"
            )

    def published(self) -> list[tuple[int, int]]:
        """Returns (start of the run, step) of every checkpoint with a readable manifest, newest last.

        A run that was told to go on from an early checkpoint may still hold later steps of an older start.
        """
        found = []
        for path in (self.run_dir / "checkpoints").glob("step_*/manifest.json"):
            step = path.parent.name.removeprefix("step_")
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                found.append((int(json.loads(path.read_text()).get("life", 0)), int(step)))
        return sorted(found)

    def newest_step(self) -> int:
        """Returns the step of the newest published checkpoint, 0 without one."""
        published = self.published()
        return published[-1][1] if published else 0

    def starts(self) -> int:
        """Returns how often the run was started so far, by this job or another."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((self.run_dir / "life").read_text())["life"])
        return 0

    def has_own_checkpoint(self) -> bool:
        """Whether a life of this job has published one."""
        before = next((event.get("starts", 0) for event in self.events("begin")), 0)
        return any(start > before for start, _ in self.published())

    def stalled(self, step: int) -> int:
        """Counts the newest lives of this job that began at the checkpoint which is still the newest."""
        count = 0
        for life in reversed(self.events("begin")):
            if life["step"] != step:
                break
            count += 1
        return count

    def summary(self) -> dict:
        """Returns the run's summary.json; empty while there is none."""
        return read_summary(self.run_dir)


def limit(name: str, default: int) -> int:
    """Returns a whole number from the environment.

    Raises:
        UserError: it is something else.
    """
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"{name} = {text!r} is not a whole number", f"the default is {default}")
    return int(text)


def refusal(lives: Lives, restart: int, step: int) -> str | None:
    """Returns why there may be no further life, in words, or None.

    Args:
        restart: the requeues that another life would have made.
        step: of the newest checkpoint.
    """
    most = limit("GDRT_MAX_REQUEUES", 20)
    stalled_most = limit("GDRT_MAX_STALLED", 2)
    if restart > most:
        return f"{most} requeues are used up (GDRT_MAX_REQUEUES); submit again to go on from step {step}"
    stalled = lives.stalled(step)
    if stalled >= stalled_most:
        return (
            f"no progress: {stalled} lives in a row ended without a checkpoint newer than step {step} "
            f"(GDRT_MAX_STALLED={stalled_most}). "
            f"Look at {lives.path.parent.parent}; if only time is short, lower train.save_every or ask for "
            "more --time"
        )
    return None


def look(args: argparse.Namespace) -> dict:
    """Checks the settings and makes the run folder; VERDICT=finished for a run that needs no more lives."""
    from gdrt_ds.train import parse

    train = parse(args.train)
    config = load_config(train.config, train.overrides)
    run_dir = Path(config.run.dir).absolute()
    if config.run.overwrite:
        raise UserError(
            "run.overwrite = true in a job that requeues itself: every life would empty what the one before "
            "saved",
            f"remove {run_dir} yourself, or choose another run.dir",
        )
    try:
        (run_dir / "logs" / "slurm").mkdir(parents=True, exist_ok=True)
        probe = run_dir / "logs" / ".write_probe"
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"run.dir = {run_dir}: not writable ({error.strerror})",
            "choose another run.dir, or mend space and permissions",
        ) from None
    if Lives(run_dir, "").summary().get("status") == "completed":
        say(f"{run_dir} is a finished run: nothing to do")
        return {"VERDICT": "finished", "RUN_DIR": run_dir}
    explicit = config.resume not in (None, "auto")
    return {"VERDICT": "start", "RUN_DIR": run_dir, "EXTRA": [] if explicit else ["resume=auto"]}


def begin(args: argparse.Namespace) -> dict:
    """Decides whether a life may begin; returns the answer to the shell."""
    answer = look(args)
    run_dir = answer["RUN_DIR"]
    if answer["VERDICT"] == "finished":
        return answer
    lives = Lives(run_dir, args.job)
    others = {e["job"] for e in Lives(run_dir, "").events("begin")} - {args.job}
    running = sorted(others & set(args.active.split()))
    if running:
        raise UserError(
            f"run.dir = {run_dir} is in use by job {running[0]}, which is still running",
            f"scancel {running[0]}, or choose another run.dir",
        )
    step = lives.newest_step()
    reason = refusal(lives, args.restart, step)
    if reason:
        say(f"stopped: {reason}")
        raise SystemExit(1)
    lives.write(
        "begin",
        restart=args.restart,
        step=step,
        starts=lives.starts(),
        nodes=os.environ.get("SLURM_JOB_NODELIST"),
    )
    start = f"from checkpoint step {step}" if step else "no checkpoint yet"
    say(f"life {args.restart} of job {args.job}: {run_dir}, {start}")
    if args.restart and lives.has_own_checkpoint():
        # An explicit checkpoint is where the job starts, until it has one of its own.
        answer["EXTRA"] = ["resume=auto"]
    logs = lives.path.parent / f"job_{args.job}_life_{args.restart}"
    logs.mkdir(exist_ok=True)
    return answer | {"LOGS": logs}


def first_failure(logs: Path) -> tuple[int, str] | None:
    """Returns (exit status, description) of the rank that ended first with an error.

    Its peers' errors follow from it.
    """
    ended = []
    for path in logs.glob("rank_*.exit"):
        words = path.read_text().split()
        if len(words) == 3 and words[0] != "0":
            ended.append((float(words[1]), int(words[0]), path.stem.removeprefix("rank_"), words[2]))
    if not ended:
        return None
    _, code, rank, node = min(ended)
    what = f"rank {rank} on {node} ended with status {code}"
    if code in STATUSES:
        what += f" ({STATUSES[code]})"
    return code, what


@dataclass(frozen=True)
class Ending:
    """What follows from the end of a life.

    Attributes:
        verdict: done, requeue, hold or stop.
        code: exit status of the batch script.
        text: what is told.
    """

    verdict: str
    code: int
    text: str


def end(args: argparse.Namespace) -> dict:
    """Decides what follows from the end of a life; returns the answer to the shell."""
    run_dir = Path(args.run_dir)
    lives = Lives(run_dir, args.job)
    newer = max((event["restart"] for event in lives.events("begin")), default=0)
    if newer > args.restart:
        # This script was cut off and woke up: it must neither requeue the job that goes on nor speak for
        # the run.
        say(f"life {args.restart} is over: life {newer} of this job goes on with {run_dir}")
        return {"VERDICT": "stop", "CODE": 1}
    ending = judge(args, lives)
    lives.write(
        "end",
        restart=args.restart,
        step=lives.newest_step(),
        code=ending.code,
        step_code=args.code,
        verdict=ending.verdict,
        text=ending.text,
    )
    say(ending.text)
    return {"VERDICT": ending.verdict, "CODE": ending.code}


def judge(args: argparse.Namespace, lives: Lives) -> Ending:
    """Returns what follows from the status of the ranks, the state of the job and the run's own summary."""
    run_dir = lives.run_dir
    logs = run_dir / "logs" / "slurm" / f"job_{args.job}_life_{args.restart}"
    step = lives.newest_step()
    status = lives.summary().get("status")
    code, what = first_failure(logs) or (args.code, f"the step ended with status {args.code}")
    if status == "completed":
        # A signal may have come while the interpreter was closing.
        late = f" (after that {what})" if args.code else ""
        return Ending("done", 0, f"the run is complete: {run_dir}{late}")
    if args.code == 0:
        text = f"the ranks ended without an error, but {run_dir}/summary.json says {status!r}"
        return Ending("stop", 1, text)
    if args.state != "RUNNING" and args.reason != "TimeLimit":
        text = (
            f"the job was ended from outside ({args.state}); checkpoint step {step} is safe, submit again "
            "to go on"
        )
        return Ending("stop", 1, text)
    if code == UserError.status:
        text = (
            f"{what}: a setting has to be mended, so there is no requeue; the message is in {logs}/rank_0.log"
        )
        return Ending("stop", code, text)
    if args.early:
        code = EXIT_INTERRUPTED
        text = f"the time limit is reached; newest checkpoint: step {step}"
    elif code == EXIT_INTERRUPTED:
        text = f"interrupted, all ranks saved step {step}"
    else:
        text = f"{what}; newest checkpoint: step {step}; logs: {logs}"
    reason = refusal(lives, args.restart + 1, step)
    if reason:
        return Ending("stop", 1, f"{text}; stopped: {reason}")
    if code == StorageError.status:
        advice = f"the job is held: free space, then `scontrol release {args.job}`"
        return Ending("hold", code, f"{text}; {advice}")
    return Ending("requeue", code, f"{text}; the job requeues itself")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("look", "begin", "end"):
        sub = actions.add_parser(name)
        if name == "look":
            continue
        sub.add_argument("--job", required=True)
        sub.add_argument("--restart", type=int, required=True, help="SLURM_RESTART_COUNT")
        if name == "begin":
            sub.add_argument("--active", default="", help="ids of jobs that are running now")
        else:
            sub.add_argument("--run-dir", required=True)
            sub.add_argument("--code", type=int, required=True, help="exit status of srun")
            sub.add_argument("--state", required=True, help="JobState of `scontrol show job`")
            sub.add_argument("--reason", required=True)
            sub.add_argument(
                "--early",
                action="store_true",
                help="the ranks are still ending: the time limit leaves no time to wait for them",
            )
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.train = words[cut + 1 :]  # the arguments of gdrt_ds/train.py
    try:
        answer = {"look": look, "begin": begin, "end": end}[args.action](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    for name, value in answer.items():
        if isinstance(value, list):
            print(f"{name}=({' '.join(shlex.quote(str(part)) for part in value)})")
        else:
            print(f"{name}={shlex.quote(str(value))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
