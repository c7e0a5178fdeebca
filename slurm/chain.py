"""Chains of jobs for submit.py: `build` the jobs of a checked request (checks.py), `show` or `submit` them.

Slurm's own commands do the work. A chain is kept as FOLDER/logs/slurm/chain.json (FOLDER = run.dir) or
INTO/chain.json (a grid), for `submit.py --status`.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grid import Cell, grid, write_list

from gdrt_ds.config import RunConfig, load_config
from gdrt_ds.errors import UserError
from gdrt_ds.files import preset_path

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


@dataclass(frozen=True)
class Request:
    """What a submission asks for, and where it goes.

    Attributes:
        args: the command line of submit.py.
        config: the config of the run, or of every run of a grid.
        cells: the runs of a grid; empty for one run.
        folder: the run folder, or the folder of the grid.
        logs: folder of the jobs' logs.
        record: the file of the chain.
        runs: run folders.
    """

    args: argparse.Namespace
    config: RunConfig
    cells: list[Cell]
    folder: Path
    logs: Path
    record: Path
    runs: list[str]

    @property
    def array(self) -> str:
        """Slurm's words for one task per run of a grid; empty for one run."""
        if not self.cells:
            return ""
        return f"0-{len(self.cells) - 1}%{self.args.at_once}"


def build(args: argparse.Namespace) -> Chain:
    """Returns the jobs of the request, not yet submitted. Makes the folders that logs go to.

    Raises:
        UserError: a folder is not writable, or a chain of it still lives.
    """
    request = _request(args)
    if not args.dry_run:
        _claim_folders(request)
    jobs = []
    if args.prepare:
        jobs.append(_prepare_job(request))
    jobs.append(_train_job(request, after=[job.name for job in jobs]))
    evaluations = _evaluation_jobs(request)
    jobs += evaluations
    folders = _compared_folders(request)
    if len(folders) > 1:
        words = [*folders, "--output", str(request.folder / "comparison")]
        names = [job.name for job in evaluations]
        jobs.append(Job("compare", "compare.sh", words, _small_options(args), names))
    for job in jobs:
        ending = "%A_%a" if job.array else "%j"
        job.log = str(request.logs / f"{job.name}-{ending}.log")
    return Chain(str(request.folder), str(request.record), request.runs, jobs)


def _request(args: argparse.Namespace) -> Request:
    config = load_config(args.config, args.overrides)
    if is_grid(args):
        seeds = args.seeds or [str(config.train.seed)]
        cells = grid(args.objectives or [config.objective], seeds, args.taus or [""])
        folder = Path(args.into or "runs/sweep").absolute()
        runs = [str(folder / cell.name) for cell in cells]
        return Request(args, config, cells, folder, folder / "logs", folder / "chain.json", runs)
    folder = Path(config.run.dir).absolute()
    logs = folder / "logs" / "slurm"
    return Request(args, config, [], folder, logs, logs / "chain.json", [str(folder)])


def _claim_folders(request: Request) -> None:
    """Makes the folder of the logs, and the list of runs of a grid.

    Raises:
        UserError: it is not writable, or a chain of it still lives.
    """
    try:
        request.logs.mkdir(parents=True, exist_ok=True)
        probe = request.logs / ".write_probe"
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        option = "--into" if request.cells else "run.dir"
        raise UserError(
            f"{option} = {request.folder}: not writable ({error.strerror})",
            "choose another folder, or mend its permissions",
        ) from None
    refuse_second(request.record)
    if request.cells:
        write_list(request.folder, request.cells)


def _common_options(args: argparse.Namespace) -> list[str]:
    """Options of sbatch that every job has."""
    found = ["--parsable", "--kill-on-invalid-dep=yes"]
    for name in ("partition", "account", "qos", "constraint"):
        value = getattr(args, name)
        if value:
            found.append(f"--{name}={value}")
    if args.mem:
        found.append(f"--mem={args.mem}")
    return found


def _options(args: argparse.Namespace, nodes: int, duration: str | None) -> list[str]:
    """Options of a job with ranks on every GPU of its nodes."""
    found = [*_common_options(args), f"--nodes={nodes}", f"--ntasks-per-node={ranks_per_node(args)}"]
    cpus = args.cpus_per_task
    if gpus_per_node(args):
        found.append(f"--gpus-per-node={args.gpus_per_node}")
        cpus = cpus or 8
    if cpus:
        found.append(f"--cpus-per-task={cpus}")
    if duration:
        found.append(f"--time={duration}")
    return [*found, *shlex.split(args.sbatch)]


def _small_options(args: argparse.Namespace) -> list[str]:
    """Options of a job of one process without a GPU."""
    found = [*_common_options(args), "--nodes=1", "--ntasks=1"]
    if args.eval_time:
        found.append(f"--time={args.eval_time}")
    return [*found, *shlex.split(args.sbatch)]


def _train_words(request: Request) -> list[str]:
    """The arguments of train.py."""
    args = request.args
    words = ["--config", str(preset_path(args.config).absolute())]
    if args.deepspeed_config:
        words += ["--deepspeed_config", args.deepspeed_config]
    words += [setting for setting in args.overrides if not setting.startswith("run.dir=")]
    if not request.cells:
        words.append(f"run.dir={request.folder}")
    return words


def _prepare_job(request: Request) -> Job:
    if request.cells:
        raise UserError("--prepare with a grid: each run has its own cache", "leave --prepare out")
    options = _options(request.args, 1, request.args.eval_time)
    return Job("prepare", "prepare.sh", _train_words(request), options)


def _train_job(request: Request, after: list[str]) -> Job:
    args = request.args
    options = _options(args, args.nodes, args.time)
    words = _train_words(request)
    if not request.cells:
        return Job("train", "gdrt.sh", words, options, after)
    lists = ["--objectives", ",".join(args.objectives or [request.config.objective])]
    seeds = args.seeds or [str(request.config.train.seed)]
    lists += ["--seeds", ",".join(seeds), "--into", str(request.folder)]
    if args.taus:
        lists += ["--taus", ",".join(args.taus)]
    return Job("train", "sweep.sh", [*lists, "--", *words], options, after, array=request.array)


def _evaluation_jobs(request: Request) -> list[Job]:
    """The evaluation of every run, and that of the base model they started from."""
    args = request.args
    options = _options(args, args.eval_nodes, args.eval_time)
    words = shlex.split(args.eval_args)
    which = ["--run", str(request.folder)]
    relation = "afterok"
    if request.cells:
        which = ["--runs", str(request.folder / "runs.txt")]
        relation = "aftercorr"  # each array task waits for its own run only
    tuned = Job("evaluate", "eval.sh", [*which, *words], options, ["train"], relation, request.array)
    if args.no_base:
        return [tuned]
    base = ["--run", request.runs[0], "--base", *words]
    return [tuned, Job("evaluate-base", "eval.sh", base, list(options), ["train"])]


def _compared_folders(request: Request) -> list[str]:
    """Evaluation folders that the comparison takes."""
    args = request.args
    words = shlex.split(args.eval_args)
    on_rows = trains_on_rows(request.config)
    folders = list(args.compare_with)
    if not args.no_base:
        folders.append(evaluation_folder(request.runs[0], words, on_rows=on_rows, is_base=True))
    return folders + [evaluation_folder(run, words, on_rows=on_rows) for run in request.runs]


def is_grid(args: argparse.Namespace) -> bool:
    """Whether runs are asked for by lists, be it of one value."""
    return bool(args.objectives or args.seeds or args.taus or args.into)


def evaluation_folder(run: str, words: list[str], *, on_rows: bool, is_base: bool = False) -> str:
    """Returns the folder that eval.run chooses inside RUN/eval for these arguments.

    Args:
        words: arguments of eval.run.
        on_rows: the run is on rows of prompt and completion.
        is_base: its base model is evaluated.

    Raises:
        UserError: the arguments name another folder, or a mode that rows do not have.
    """
    from eval.output import default_folder, what_is_scored
    from eval.run import parse

    chosen = parse(["--run", "x", *words])
    if chosen.output:
        problem = "--eval-args --output: the chain's comparison needs the default evaluation folders"
        raise UserError(problem, "leave --output out")
    if on_rows and chosen.mode in ("best_first", "beam"):
        raise UserError(
            f"--eval-args --mode {chosen.mode}: rows of prompt and completion have no catalogue to search",
            "leave --mode out",
        )
    what = what_is_scored(chosen.split, chosen.mode, chosen.scoring, on_rows=on_rows)
    return str(default_folder(Path(run), "", what, limit=chosen.limit, is_base=is_base))


def trains_on_rows(config: RunConfig) -> bool:
    """Whether the data are rows of prompt and completion; data that are not there yet have a catalogue."""
    from gdrt_ds.data.corpus import reader_of

    try:
        return bool(reader_of(config.data).supervised)
    except UserError:  # the training says what is wrong with them
        return False


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
