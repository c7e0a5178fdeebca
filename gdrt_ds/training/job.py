"""A started run: its settings, its ranks, its folder.

Opens the folder, stops early when asked, leaves the last word on failure.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from gdrt_ds.config import RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.runtime import EXIT_INTERRUPTED, Runtime, Watchdog, ignore_stop_signals
from gdrt_ds.training import run_folder
from gdrt_ds.training.checkpoint import newest_step
from gdrt_ds.training.lives import begin_life, current_life
from gdrt_ds.training.telemetry import say


@dataclass(frozen=True)
class Job:
    """One start of one run on one process group.

    Attributes:
        folder: the run folder, claimed for this start.
        life: number of this start. A process of an earlier start may still be alive; it must not publish.
        started: time.time() at the start.
        goes_on: the folder held a run before this start, whose files stay whatever happens.
    """

    config: RunConfig
    runtime: Runtime
    folder: Path
    life: int
    started: float
    goes_on: bool = False

    def say(self, text: str) -> None:
        """One line from rank 0."""
        say(self.runtime, text)

    def watchdog(self, timeout_s: int) -> Watchdog:
        """Ends this rank, with the stacks of its threads, when no `beat` comes for `timeout_s` seconds."""
        return Watchdog(self.runtime, self.folder / "logs", timeout_s)


def open_job(config: RunConfig, runtime: Runtime) -> Job:
    """Claims the run folder and seeds the global random generators. Every rank calls it.

    Raises:
        UserError: on every rank, if the folder is in use, foreign, or of a run with other settings.
    """
    started = time.time()

    def claim() -> tuple[str, int, bool]:
        goes_on = config.resume is not None and (Path(config.run.dir) / "config.yaml").is_file()
        folder = run_folder.claim(config)
        (folder / "logs").mkdir(exist_ok=True)
        return str(folder), begin_life(config.run.dir), goes_on

    folder, life, goes_on = on_main_rank(runtime, claim)
    _seed_everything(config.train.seed)
    return Job(config, runtime, Path(folder), life, started, goes_on)


def on_main_rank(runtime: Runtime, action: Callable[[], Any]) -> Any:
    """Runs `action` on rank 0; every rank gets its result, or raises its error. Every rank calls it.

    For what every rank could see for itself and must not: two nodes can read other names in one folder of a
    network file system, for as long as it keeps directories in its cache.

    Args:
        action: returns what can be pickled.
    """
    answer: dict[str, Any] = {}
    broken: Exception | None = None
    if runtime.is_main:
        try:
            answer = {"result": action()}
        except UserError as error:
            answer = {"error": (error.problem, error.fix)}
        except Exception as error:  # the other ranks wait for an answer
            broken, answer = error, {"broken": f"rank 0: {type(error).__name__}: {error}"}
    if dist.is_initialized() and runtime.world > 1:
        shared = [answer]
        dist.broadcast_object_list(shared, src=0)
        answer = shared[0]
    if broken is not None:
        raise broken
    if "broken" in answer:
        raise RuntimeError(answer["broken"])
    if "error" in answer:
        raise UserError(*answer["error"])
    return answer["result"]


def _seed_everything(seed: int) -> None:
    """The global generators, for code that draws from them (an objective of your own).

    Ours has generators of its own.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def is_asked_to_stop(job: Job) -> bool:
    """Whether a signal asked any of the ranks to stop. Every rank calls it and gets the same."""
    asked = torch.tensor([float(job.runtime.stop_signal is not None)], device=job.runtime.device)
    if job.runtime.world > 1:
        dist.all_reduce(asked)
    return asked.item() > 0


def stop_if_asked(job: Job, step: int = 0) -> None:
    """Ends all ranks with status 75 if any of them was asked to stop. Every rank calls it.

    For the time before training, when there is nothing to save yet. Once training runs, the step's own
    all-reduce carries the request, and the run saves before it ends.

    Args:
        step: steps that are done; 0 where the checkpoint was not read yet, and then the newest one says it.
    """
    if not is_asked_to_stop(job):
        return
    if job.runtime.is_main:
        done = step or newest_step(job.folder)
        run_folder.write_summary(job.folder, "interrupted", step=done, life=job.life)
    job.say("interrupted by a signal before training; go on with resume=auto")
    job.runtime.barrier()
    ignore_stop_signals()
    raise SystemExit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def last_word(job: Job) -> Iterator[None]:
    """Around a run: an error leaves the stacks and a summary that says `failed`.

    The newest valid checkpoint stays what it was. A start that failed before anything was computed gives
    the folder back as it found it.
    """
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            job.watchdog(job.config.train.timeout_s).dump(f"{type(error).__name__}: {error}", error)
            _summarise_failure(job, error)
        raise


def _summarise_failure(job: Job, error: Exception) -> None:
    if not job.runtime.is_main:
        return
    if current_life(job.folder) != job.life:
        # The job was started again meanwhile: the newer process owns the run folder, so this one writes
        # nothing.
        return
    if isinstance(error, UserError) and not job.goes_on and run_folder.release(job.folder):
        return
    message = f"{type(error).__name__}: {error}"[:2000]
    run_folder.write_summary(job.folder, "failed", error=message, life=job.life)
