"""Trains and evaluates the cells of a study, in this process, in workers or under a launcher.

With `ranks: 1` every worker process trains many cells, so that imports are paid once. Evaluation and page
are made by `python -m eval.study`, which is started and not imported: eval stands after gdrt_ds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from gdrt_ds.config import RunConfig, load_config
from gdrt_ds.errors import UserError, nearest
from gdrt_ds.files import REPOSITORY, read_summary, write_json
from gdrt_ds.invocation import module_command, safe_environment
from gdrt_ds.runtime import EXIT_INTERRUPTED, free_port
from gdrt_ds.studies.grid import Cell, Study, cells_of, choose_cells, load_study
from gdrt_ds.studies.keeping import keep_cell, packed_path, restore_cell
from gdrt_ds.training import run_folder

EVALUATION = "test-renormalised"


def run_of(folder: Path, cell: Cell) -> Path:
    return folder / "runs" / cell.name


def evaluation_of(folder: Path, cell: Cell) -> Path:
    return run_of(folder, cell) / "eval" / EVALUATION


def settings_of(study: Study, folder: Path, cell: Cell) -> RunConfig:
    """The run config of a cell; resume=auto, so that an interrupted run goes on and a fresh one starts."""
    return load_config(study.config, [*cell.overrides, f"run.dir={run_of(folder, cell)}", "resume=auto"])


def config_of(study: Study, folder: Path, cell: Cell) -> RunConfig:
    """The same, if the run folder was not trained with other settings.

    Raises:
        UserError: wrong settings; a run folder that was trained with others.
    """
    config = settings_of(study, folder, cell)
    changed = run_folder.changed_settings(run_of(folder, cell), config)
    if changed:
        raise UserError(
            f"{run_of(folder, cell)} was trained with other settings ({'; '.join(changed[:3])})",
            "remove that folder to train it again, or give another --dir",
        )
    return config


def state_of(folder: Path, cell: Cell) -> str:
    """new, started, interrupted, failed, trained or done (trained and evaluated)."""
    run = run_of(folder, cell)
    if run_folder.status(run) == "completed":
        return "done" if (evaluation_of(folder, cell) / "results.json").is_file() else "trained"
    return run_folder.status(run) or ("started" if (run / "config.yaml").is_file() else "new")


def write_grid(study: Study, folder: Path, cells: list[Cell]) -> None:
    """grid.json: what the page needs to know about the cells."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            **asdict(c),
            "run": str(Path("runs") / c.name),
            "evaluation": str(Path("runs") / c.name / "eval" / EVALUATION),
        }
        for c in cells
    ]
    write_json(folder / "grid.json", {"study": study.model_dump(), "cells": rows})


# -- training
def train_in_process(study: Study, folder: Path, cells: list[Cell]) -> int:
    """Trains cells one after the other on one process group of one rank.

    Returns the number of failures, or 75 if interrupted.
    """
    from gdrt_ds.runtime import prepare_libraries, start_runtime

    prepare_libraries()  # before the import below brings them
    from gdrt_ds.training.run import run_training

    runtime, failures = None, 0
    for cell in cells:
        if state_of(folder, cell) in ("done", "trained"):
            continue
        config = config_of(study, folder, cell)
        runtime = runtime or start_runtime(config.train.timeout_s)
        started, log = time.process_time(), folder / "logs" / f"{cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        problem, status = "", 1
        with (
            open(log, "a", encoding="utf-8") as stream,
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
        ):
            try:
                status = run_training(config, runtime, keep_engine=False)
            except UserError as error:
                problem = str(error)
            except (
                Exception
            ) as error:  # one broken cell must not end the others; its run folder says what happened
                import traceback

                traceback.print_exc(file=stream)
                problem = f"{type(error).__name__}: {error}"
        if status == EXIT_INTERRUPTED or runtime.stop_signal is not None:
            print(f"{cell.name}: interrupted", flush=True)
            return EXIT_INTERRUPTED
        failures += status != 0
        gc.collect()  # an engine is made of cycles; its weights must be gone before the next cell loads
        seconds = time.process_time() - started
        outcome = f"trained in {seconds:.0f} CPU s"
        if status != 0:
            outcome = f"failed: {problem} (log: {log})"
        print(f"{cell.name}: {outcome}", flush=True)
    return min(failures, 64)


def train_under_launcher(study: Study, folder: Path, cells: list[Cell]) -> int:
    """`deepspeed --num_gpus R` per cell, each on a free port: two studies may run on one machine."""
    failures = 0
    for cell in cells:
        if state_of(folder, cell) in ("done", "trained"):
            continue
        config_of(study, folder, cell)  # wrong settings end here, before a launcher hides them
        launcher = ["deepspeed", "--master_port", str(free_port()), "--num_gpus", str(study.ranks)]
        command = [
            *launcher,
            str(REPOSITORY / "gdrt_ds" / "train.py"),
            "--config",
            study.config,
            *cell.overrides,
            f"run.dir={run_of(folder, cell)}",
            "resume=auto",
        ]
        log = folder / "logs" / f"{cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        before = read_summary(run_of(folder, cell))  # of an interrupted start; a killed one leaves none
        started = time.time()
        with open(log, "a", encoding="utf-8") as stream:
            path_variable = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            status = subprocess.call(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=safe_environment() | {"PATH": path_variable},
            )
        summary = read_summary(run_of(folder, cell))
        if summary.get("status") == "interrupted" and summary.get("life") != before.get("life"):
            return EXIT_INTERRUPTED
        failures += status != 0
        outcome = f"trained in {time.time() - started:.0f} s"
        if status != 0:
            outcome = f"failed with status {status} (log: {log})"
        print(f"{cell.name}: {outcome}", flush=True)
    return min(failures, 64)


# -- evaluation and page: other processes, because eval imports gdrt_ds and never the reverse
def evaluate(study: Study, folder: Path, cells: list[Cell]) -> int:
    """Evaluates what is trained and not evaluated, all in one process."""
    due = [cell for cell in cells if state_of(folder, cell) == "trained"]
    if not due:
        return 0
    words = [*module_command("eval.study"), "--evaluate", *(str(run_of(folder, cell)) for cell in due)]
    words.append(f"--arguments={json.dumps(study.evaluate)}")
    return exit_status(subprocess.call(words, env=safe_environment()), "the evaluation", due)


def report(folder: Path) -> int:
    """Writes the page of a study: `python -m eval.study FOLDER`, from any working folder."""
    status = subprocess.call([*module_command("eval.study"), str(folder)], env=safe_environment())
    return exit_status(status, "the page's process", [])


def exit_status(code: int, who: str, cells: list[Cell]) -> int:
    """The exit status of a process that ended; of one that a signal killed, that is said and it is 128 + N.

    Args:
        code: as `subprocess` gives it: -N after signal N.
        who: the process, in words.
        cells: what it worked on.
    """
    if code >= 0:
        return code
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    names = f", which had {', '.join(cell.name for cell in cells)}," if cells else ""
    print(f"{who}{names} was killed by {name}", flush=True)
    return 128 - code


def restore(study: Study, folder: Path, kept: Path | None, cells: list[Cell]) -> None:
    """Puts kept cells that this folder does not have into it: they count as done."""
    if kept is None:
        return
    for cell in cells:
        packed = packed_path(kept, cell.name)
        if packed.is_file() and state_of(folder, cell) == "new":
            restore_cell(packed, run_of(folder, cell), settings_of(study, folder, cell))
            print(f"{cell.name}: taken from {kept}", flush=True)


def work(study: Study, folder: Path, cells: list[Cell], kept: Path | None = None) -> int:
    """Trains, evaluates and keeps the cells; returns the exit status.

    With `kept`, every cell is evaluated and kept as soon as it is trained, so that little is lost when the
    machine is. Otherwise all are trained and then evaluated in one process, which saves start-up time.
    """
    train = train_in_process if study.ranks == 1 else train_under_launcher
    batches = [cells] if kept is None else [[cell] for cell in cells]
    worst = 0
    try:
        for batch in batches:
            status = train(study, folder, batch)
            if status == EXIT_INTERRUPTED:
                return status
            worst = max(worst, status, min(evaluate(study, folder, batch), 64))
            for cell in batch:
                if kept is not None and state_of(folder, cell) == "done":
                    settings = settings_of(study, folder, cell)
                    keep_cell(run_of(folder, cell), settings, evaluation_of(folder, cell), kept)
    finally:
        if dist.is_initialized():  # NCCL warns of a group that nobody left
            dist.destroy_process_group()
    return worst


def shares(cells: list[Cell], workers: int) -> list[list[Cell]]:
    """Cells for each worker, in order; a cell stays with those whose run folders it reads."""
    block_of = {cell.name: cell.name for cell in cells}
    for cell in cells:
        for needed in filter(block_of.__contains__, cell.needs):
            merged, into = block_of[cell.name], block_of[needed]
            block_of = {name: into if block == merged else block for name, block in block_of.items()}
    blocks: dict[str, list[Cell]] = {}
    for cell in cells:
        blocks.setdefault(block_of[cell.name], []).append(cell)
    parts: list[list[Cell]] = [[] for _ in range(workers)]
    for block in sorted(blocks.values(), key=len, reverse=True):
        min(parts, key=len).extend(block)
    return [part for part in parts if part]


def run_workers(
    options: argparse.Namespace, study: Study, folder: Path, cells: list[Cell], workers: int
) -> int:
    """Starts the workers as processes of this module and waits; an interruption is handed on to them.

    Returns:
        75 if one was interrupted, else the largest exit status; that of a killed worker is 128 + its signal.
    """
    parts = shares([cell for cell in cells if state_of(folder, cell) != "done"], workers)
    if len(parts) <= 1:
        kept = Path(options.keep) if options.keep else None
        return work(study, folder, parts[0], kept) if parts else 0
    cards = gpu_names(visible_gpus())
    threads = max(1, (os.cpu_count() or 1) // len(parts))
    environment = {"OMP_NUM_THREADS": str(threads)} | safe_environment()
    base = [*module_command("gdrt_ds.study"), options.study, "--dir", str(folder), *options.overrides]
    if options.keep:
        base += ["--keep", str(options.keep)]
    processes = []
    for number, part in enumerate(parts):
        own = {"CUDA_VISIBLE_DEVICES": cards[number % len(cards)]} if cards else {}
        processes.append(
            subprocess.Popen(
                [*base, "--as-worker", "--only", ",".join(cell.name for cell in part)], env=environment | own
            )
        )
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:
        codes = [
            process.wait() for process in processes
        ]  # the terminal sent them the same signal: they save and leave
    ended = [
        exit_status(code, f"worker {number}", part)
        for number, (code, part) in enumerate(zip(codes, parts, strict=True), 1)
    ]
    return EXIT_INTERRUPTED if EXIT_INTERRUPTED in ended else max(ended)


def visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def gpu_names(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each of the GPUs that this process sees."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def default_workers(study: Study) -> int:
    """One process per GPU, or per core.

    One where a cell has several ranks, which fill the machine by themselves.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if study.ranks > 1 else visible_gpus() or cores


def cells_of_options(options: argparse.Namespace, everything: list[Cell]) -> list[Cell]:
    """Returns the cells that `--only` names, or the one whose number `--cell` gives."""
    if options.only is None:
        if not 0 <= options.cell < len(everything):
            raise UserError(
                f"--cell {options.cell}: the grid has {len(everything)} cells",
                f"0 to {len(everything) - 1}; see --list",
            )
        return [everything[options.cell]]
    names = {name.strip() for name in options.only.split(",")}
    unknown = sorted(names - {cell.name for cell in everything})
    if unknown:
        raise UserError(
            f"--only {unknown[0] or '(nothing)'}: the grid has no such cell",
            nearest(unknown[0], [cell.name for cell in everything]),
        )
    return [cell for cell in everything if cell.name in names]


def refuse_untrained_needs(chosen: list[Cell], folder: Path) -> None:
    """Raises a UserError where a cell reads a run folder that is neither trained nor about to be."""
    before: set[str] = set()
    for cell in chosen:
        done = state_of(folder, cell) in ("trained", "done")
        for needed in () if done else cell.needs:
            if needed not in before and run_folder.status(folder / "runs" / needed) != "completed":
                raise UserError(
                    f"{cell.name} reads the run folder of {needed}, which is not trained",
                    "train that cell first",
                )
        before.add(cell.name)


def run_study(options: argparse.Namespace) -> int:
    """Everything that `python -m gdrt_ds.study` was asked for; returns the exit status.

    Raises:
        UserError: a mistake in the study file, the config or the command.
    """
    study = load_study(options.study, options.overrides)
    folder = Path(options.dir or Path("runs") / "studies" / study.name).absolute()
    everything = cells_of(study, folder)
    cells = choose_cells(study, everything, options.piece)
    kept = Path(options.keep) if options.keep else None
    restore(study, folder, kept, everything)
    if options.list:
        for cell in cells:
            print(
                f"{everything.index(cell):4d}  {state_of(folder, cell):<11}  {cell.name}  "
                f"{' '.join(cell.overrides)}"
            )
        return 0
    if options.report:
        write_grid(
            study, folder, everything
        )  # cells run one by one (--cell) wrote none, and the file may have got rows since
        return report(folder)
    if options.only is not None or options.cell is not None:
        chosen = cells_of_options(options, everything)
        if not options.as_worker:
            refuse_untrained_needs(chosen, folder)
        return work(study, folder, chosen, kept)
    for cell in cells:
        config_of(study, folder, cell)  # every mistake of the grid before the first step
    write_grid(study, folder, everything)
    started, workers = time.time(), options.workers or default_workers(study)
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1", "leave it out for one per core")
    done = sum(state_of(folder, cell) == "done" for cell in cells)
    print(
        f"study {study.name}: {len(cells)} cells, {done} done, {workers} worker(s), into {folder}",
        flush=True,
    )
    status = run_workers(options, study, folder, cells, workers)
    if status == EXIT_INTERRUPTED:
        print("interrupted: the same command goes on")
        return status
    page = report(folder)
    unfinished = sum(state_of(folder, cell) != "done" for cell in cells)
    print(
        f"study {study.name}: {time.time() - started:.0f} s"
        + (f"; {unfinished} cell(s) are not done, see {folder}/logs" if status else ""),
        flush=True,
    )
    return min(1, status) or page
