"""Refuses what a job would fail on, before anything waits in a queue: settings, the site, the plan."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

from chain import is_grid, ranks_per_node, slurm

from gdrt_ds.config import load_config
from gdrt_ds.errors import UserError
from gdrt_ds.files import no_such_preset, preset_path
from gdrt_ds.invocation import module_command


def check(args: argparse.Namespace) -> None:
    """Refuses what a job would fail on, before anything waits in a queue.

    Raises:
        UserError: something is wrong with settings, run folder, partition, number of ranks or environment,
            or a chain of this run still lives.
    """
    if getattr(args, "study", None):
        raise UserError(
            "--study: submit.py makes no chain of a study",
            "sbatch --array=... slurm/sweep.sh --study FILE, then python -m gdrt_ds.study FILE",
        )
    config = load_config(args.config, args.overrides)
    named = [setting for setting in args.overrides if setting.startswith("run.dir=")]
    if named and is_grid(args):
        raise UserError(
            f"{named[0]} with --objectives, --seeds, --taus or --into: the runs of a grid lie below --into",
            "leave run.dir out; for one run write objective=, train.seed= or dro.tau= instead of the list",
        )
    if args.gpu_memory is not None and not args.plan:
        raise UserError(
            f"--gpu-memory {args.gpu_memory:g} without --plan: only a plan reads it", "add --plan"
        )
    engine = args.deepspeed_config or config.deepspeed
    if not preset_path(engine).is_file():
        raise no_such_preset("deepspeed config", engine, "ds_configs", ".json")
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
        _print_plan(args, world)


def _print_plan(args: argparse.Namespace, world: int) -> None:
    """Prints the plan of the training, with the engine and the GPUs of the job.

    Raises:
        UserError: the training refuses it.
    """
    command = [
        *module_command("gdrt_ds.train"),
        "--config",
        args.config,
        *(["--deepspeed_config", args.deepspeed_config] if args.deepspeed_config else []),
        *args.overrides,
        "--plan",
        "--world",
        str(world),
        *(["--gpu-memory", str(args.gpu_memory)] if args.gpu_memory else []),
    ]
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"the plan was refused (exit status {code})", "see the message above")
