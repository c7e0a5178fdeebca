"""Chains of jobs for submit.py: `check` the request, `build` the jobs, `show` or `submit` them.

Slurm's own commands do the work. A chain is kept as FOLDER/logs/slurm/chain.json (FOLDER = run.dir) or
INTO/chain.json (a grid), for `submit.py --status`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grid import grid, write_list

from gdrt_ds.config import load_config
from gdrt_ds.errors import UserError

HOME = Path(__file__).resolve().parent.parent


@dataclass
class Job:
    """One job of a chain.

    Attributes:
        after: names of jobs of the chain that must succeed first.
        relation: Slurm's word for that.
    """

    name: str
    script: str
    arguments: list[str]
    options: list[str]
    after: list[str] = field(default_factory=list)
    relation: str = "afterok"
    array: str = ""
    log: str = ""
    id: str = ""


@dataclass
class Chain:
    """Jobs in the order of submission; `folder` holds the record, the logs and what the jobs leave behind."""

    folder: str
    record: str
    runs: list[str]
    jobs: list[Job]

    def job(self, name: str) -> Job:
        return next(job for job in self.jobs if job.name == name)


def slurm(*command: str, check: bool = True) -> str:
    """Returns the output of one of Slurm's commands.

    Raises:
        UserError: it failed; with Slurm's own words.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"the command `{command[0]}` is not on this machine",
            "run this on a login node of the cluster; without Slurm: deepspeed gdrt_ds/train.py ...",
        )
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(
            f"{command[0]} refused: {words[-1].removeprefix(command[0] + ': error: ')}",
            f"the command was: {shlex.join(command)}",
        )
    return done.stdout if done.returncode == 0 else ""


def known(job_id: str) -> list[dict[str, str]]:
    """Returns what `scontrol show job` says, a record per array task; none when Slurm forgot the job."""
    text = slurm("scontrol", "-o", "show", "job", job_id, check=False)
    return [
        dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.splitlines() if line.startswith("JobId=")
    ]


def gpus_per_node(args: argparse.Namespace) -> int:
    text = args.gpus_per_node or "0"
    number = text.rpartition(":")[2]
    if not number.isdigit():
        raise UserError(
            f"--gpus-per-node {text}: expected N or TYPE:N",
            "e.g. --gpus-per-node 8 or --gpus-per-node h100:8",
        )
    return int(number)


def ranks_per_node(args: argparse.Namespace) -> int:
    gpus = gpus_per_node(args)
    if gpus and args.ntasks_per_node and args.ntasks_per_node != gpus:
        raise UserError(
            f"--ntasks-per-node {args.ntasks_per_node} with {gpus} GPUs per node: one rank per GPU is what "
            "runs",
            "leave --ntasks-per-node out",
        )
    return gpus or args.ntasks_per_node or 1


def check(args: argparse.Namespace) -> None:
    """Refuses what a job would fail on, before anything waits in a queue.

    Raises: UserError: something is wrong with settings, run folder, partition, number of ranks or
    environment, or a
            chain of this run still lives.
    """
    if getattr(args, "study", None):
        raise UserError(
            "--study: submit.py makes no chain of a study",
            "sbatch --array=... slurm/sweep.sh --study FILE, then python -m gdrt_ds.study FILE",
        )
    config = load_config(args.config, args.overrides)
    world = args.nodes * ranks_per_node(args)
    if config.train.global_batch < world:
        raise UserError(
            f"{args.nodes} node(s) x {ranks_per_node(args)} = {world} ranks, but train.global_batch = "
            f"{config.train.global_batch}",
            f"use at most {config.train.global_batch} ranks, or set train.global_batch to at least {world}",
        )
    for name in ("GDRT_VENV", "GDRT_SETUP"):
        path = os.environ.get(name)
        if path and not Path(path).exists():
            raise UserError(
                f"{name} = {path} does not exist",
                "make install creates .venv; the path must exist on every node",
            )
    for folder in args.compare_with:
        if not (Path(folder) / "results.json").is_file():
            raise UserError(
                f"--compare-with {folder}: not an evaluation folder (it has no results.json)",
                "python -m eval.run makes one",
            )
    if config.run.overwrite:
        raise UserError(
            "run.overwrite = true in a job that requeues itself",
            f"remove {config.run.dir} yourself, or choose another run.dir",
        )
    if args.partition and not args.dry_run:
        names = slurm("sinfo", "-h", "-o", "%R").split()
        unknown = sorted(set(args.partition.split(",")) - set(names))
        if unknown:
            raise UserError(
                f"--partition {unknown[0]}: this cluster has no such partition",
                f"partitions here: {', '.join(sorted(set(names)))}",
            )
    if args.plan:
        command = [
            sys.executable,
            str(HOME / "gdrt_ds" / "train.py"),
            "--config",
            args.config,
            *args.overrides,
            "--plan",
            "--world",
            str(world),
        ]
        code = subprocess.run(command).returncode
        if code:
            raise UserError(f"the plan was refused (exit status {code})", "see the message above")


def build(args: argparse.Namespace) -> Chain:
    """Returns the jobs of the request, not yet submitted. Makes the folders that logs go to.

    Raises:
        UserError: a folder is not writable, or a chain of it still lives.
    """
    config = load_config(args.config, args.overrides)
    cells = grid(args.objectives or [config.objective], args.seeds, args.taus) if is_grid(args) else []
    if cells:
        folder = Path(args.into or "runs/sweep").absolute()
        logs, record, runs = (
            folder / "logs",
            folder / "chain.json",
            [str(folder / cell.name) for cell in cells],
        )
    else:
        folder = Path(config.run.dir).absolute()
        logs, record, runs = (
            folder / "logs" / "slurm",
            folder / "logs" / "slurm" / "chain.json",
            [str(folder)],
        )
    if not args.dry_run:
        try:
            logs.mkdir(parents=True, exist_ok=True)
            (logs / ".write_probe").write_text("x")
            (logs / ".write_probe").unlink()
        except OSError as error:
            raise UserError(
                f"{'--into' if cells else 'run.dir'} = {folder}: not writable ({error.strerror})",
                "choose another folder, or mend its permissions",
            ) from None
        refuse_second(record)
        if cells:
            write_list(folder, cells)
    site = [
        f"--{name}={value}"
        for name in ("partition", "account", "qos", "constraint")
        if (value := getattr(args, name))
    ]
    common = ["--parsable", "--kill-on-invalid-dep=yes", *site]
    if args.mem:
        common.append(f"--mem={args.mem}")
    train_config = [
        "--config",
        str(Path(args.config).absolute()),
        *(["--deepspeed_config", args.deepspeed_config] if args.deepspeed_config else []),
        *(o for o in args.overrides if not o.startswith("run.dir=")),
    ]
    single = [] if cells else [f"run.dir={folder}"]

    def options(nodes: int, duration: str | None) -> list[str]:
        gpus = [f"--gpus-per-node={args.gpus_per_node}"] if gpus_per_node(args) else []
        cpus = args.cpus_per_task or (8 if gpus else None)
        return [
            *common,
            f"--nodes={nodes}",
            f"--ntasks-per-node={ranks_per_node(args)}",
            *gpus,
            *([f"--cpus-per-task={cpus}"] if cpus else []),
            *([f"--time={duration}"] if duration else []),
            *shlex.split(args.sbatch),
        ]

    jobs, wait, array = [], [], f"0-{len(cells) - 1}%{args.at_once}" if cells else ""
    if args.prepare:
        if cells:
            raise UserError("--prepare with a grid: each run has its own cache", "leave --prepare out")
        jobs.append(Job("prepare", "prepare.sh", [*train_config, *single], options(1, args.eval_time)))
        wait = ["prepare"]
    if cells:
        words = [
            "--objectives",
            ",".join(args.objectives or [config.objective]),
            "--seeds",
            ",".join(args.seeds),
            "--into",
            str(folder),
        ]
        words += ["--taus", ",".join(args.taus)] if args.taus != [""] else []
        jobs.append(
            Job(
                "train",
                "sweep.sh",
                [*words, "--", *train_config],
                options(args.nodes, args.time),
                wait,
                array=array,
            )
        )
    else:
        jobs.append(Job("train", "gdrt.sh", [*train_config, *single], options(args.nodes, args.time), wait))
    eval_words = shlex.split(args.eval_args)
    which = ["--runs", str(folder / "runs.txt")] if cells else ["--run", str(folder)]
    jobs.append(
        Job(
            "evaluate",
            "eval.sh",
            [*which, *eval_words],
            options(args.eval_nodes, args.eval_time),
            ["train"],
            relation="aftercorr" if cells else "afterok",
            array=array,
        )
    )  # aftercorr: each array task waits for its own run only
    if not args.no_base:
        jobs.append(
            Job(
                "evaluate-base",
                "eval.sh",
                ["--run", runs[0], "--base", *eval_words],
                options(args.eval_nodes, args.eval_time),
                ["train"],
            )
        )
    name = evaluation_name(eval_words)
    folders = [
        *args.compare_with,
        *([] if args.no_base else [str(Path(runs[0]) / "eval" / f"{name}-base")]),
        *(str(Path(r) / "eval" / name) for r in runs),
    ]
    if len(folders) > 1:
        small = [
            *common,
            "--nodes=1",
            "--ntasks=1",
            *([f"--time={args.eval_time}"] if args.eval_time else []),
            *shlex.split(args.sbatch),
        ]
        jobs.append(
            Job(
                "compare",
                "compare.sh",
                [*folders, "--output", str(folder / "comparison")],
                small,
                [j.name for j in jobs if j.name.startswith("evaluate")],
            )
        )
    for job in jobs:
        job.log = str(logs / (f"{job.name}-%A_%a.log" if job.array else f"{job.name}-%j.log"))
    return Chain(str(folder), str(record), runs, jobs)


def is_grid(args: argparse.Namespace) -> bool:
    return max(len(args.objectives or []), len(args.seeds), len(args.taus)) > 1


def evaluation_name(words: list[str]) -> str:
    """Returns the folder that eval.run chooses inside RUN/eval for these arguments."""
    from eval.run import parse

    chosen = parse(["--run", "x", *words])
    if chosen.output:
        raise UserError(
            "--eval-args --output: the chain's comparison needs the default evaluation folders",
            "leave --output out",
        )
    parts = [chosen.split, chosen.mode]
    if chosen.mode in ("best_first", "beam") and chosen.scoring != "renormalised":
        parts.append(chosen.scoring)
    return "-".join(parts + ([f"limit{chosen.limit}"] if chosen.limit else []))


def refuse_second(record: Path) -> None:
    """Raises UserError for a second chain that would write into the folders of one that still lives."""
    if not record.is_file():
        return
    for job in load(record).jobs:
        living = [
            r
            for r in known(job.id)
            if r.get("JobState") in ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")
        ]
        if living:
            raise UserError(
                f"{record.parent} belongs to a chain that still lives: job {job.id} ({job.name}) is "
                f"{living[0]['JobState'].lower()}",
                f"wait, or scancel {' '.join(j.id for j in load(record).jobs)}, or choose another run.dir",
            )


def command(chain: Chain, job: Job) -> list[str]:
    """Returns the sbatch call; jobs that are not submitted yet appear as <name>."""
    ids = [chain.job(name).id or f"<{name}>" for name in job.after]
    return [
        "sbatch",
        *job.options,
        f"--job-name=gdrt-{job.name}",
        f"--output={job.log}",
        *([f"--array={job.array}"] if job.array else []),
        *([f"--dependency={job.relation}:{':'.join(ids)}"] if ids else []),
        str(HOME / "slurm" / job.script),
        *job.arguments,
    ]


def show(chain: Chain) -> str:
    """Returns every command in order, then every script in full."""
    lines = [f"# {chain.folder}: {len(chain.jobs)} jobs; nothing is submitted"]
    lines += [f"\n# {job.name}\n{shlex.join(command(chain, job))}" for job in chain.jobs]
    scripts = list(
        dict.fromkeys(
            [
                *(job.script for job in chain.jobs),
                *(["gdrt.sh"] if chain.job("train").array else []),
                "common.sh",
                "rank.sh",
            ]
        )
    )
    for name in scripts:
        lines.append(
            f"\n# ---- slurm/{name} "
            + "-" * (100 - len(name))
            + f"\n{(HOME / 'slurm' / name).read_text(encoding='utf-8').rstrip()}"
        )
    return "\n".join(lines)


def submit(chain: Chain) -> str:
    """Submits in order, checks that Slurm knows every job, writes the record; returns what to tell the user.

    Raises:
        UserError: sbatch refused a job; those submitted before it are cancelled again.
    """
    for job in chain.jobs:
        try:
            job.id = slurm(*command(chain, job)).strip().partition(";")[0]
            if not known(job.id):
                time.sleep(2)  # the controller may be restarting; a job it accepted just before can be lost
                if not known(job.id):
                    raise UserError(
                        f"sbatch gave job {job.id} for {job.name}, but Slurm does not know it",
                        "the controller lost it: submit again",
                    )
        except UserError:
            sent = [j.id for j in chain.jobs if j.id]
            if sent:
                slurm("scancel", *sent, check=False)
                print(f"cancelled again: {' '.join(sent)}", file=sys.stderr)
            raise
    Path(chain.record).write_text(json.dumps(asdict(chain), indent=1), encoding="utf-8")
    width = max(len(job.name) for job in chain.jobs)
    lines = [f"submitted: {chain.folder}"]
    for job in chain.jobs:
        after = f"  after {', '.join(job.after)}" if job.after else ""
        tasks = f"  tasks {job.array}" if job.array else ""
        log = job.log.replace("%j", job.id).replace("%A", job.id)
        lines.append(f"  {job.name:{width}}  job {job.id}{tasks}{after}  log {log}")
    lines += [
        f"how it goes:  python slurm/submit.py --status {chain.folder}",
        f"to stop it:   scancel {' '.join(j.id for j in chain.jobs)}",
    ]
    return "\n".join(lines)


def load(record: Path) -> Chain:
    body = json.loads(record.read_text(encoding="utf-8"))
    return Chain(body["folder"], body["record"], body["runs"], [Job(**job) for job in body["jobs"]])
