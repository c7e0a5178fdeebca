"""What ranks agree on when one of them fails to write.

All of them raise the same error, and none waits in a collective.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from gdrt_ds.errors import StorageError, UserError
from gdrt_ds.files import written_file

TAKEN_OVER = "was taken over by"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def rank_here() -> int:
    """Returns the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def attempt(action: Callable[[], object], on: bool = True) -> str | None:
    """Runs the action (if `on`) and returns None, or a failed write in words.

    An exception here would leave the other ranks waiting in their next collective; words can be shared
    (`agree`).
    """
    if not on:
        return None
    try:
        action()
    except UserError as error:
        return error.problem
    except WRITE_ERRORS as error:
        if isinstance(error, OSError) and error.filename:
            return f"{type(error).__name__}: {written_file(error)}: {error.strerror}"
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0] if text else ''}"
    return None


def agree(engine, problem: str | None, scratch: Path, what: str | None = None) -> None:
    """Raises on every rank if any rank has a problem; it is also the barrier between the phases of a save."""
    failed = problem is not None
    if world_size() > 1:
        flag = torch.tensor([float(failed)], device=engine.device)
        dist.all_reduce(flag)
        failed = bool(flag.item() > 0)
    if not failed:
        return
    texts = [problem]
    if world_size() > 1:
        texts = [None] * world_size()
        dist.all_gather_object(texts, problem)
    if rank_here() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
    which = next(rank for rank, text in enumerate(texts) if text)
    mistake = TAKEN_OVER in texts[which] or (what is not None and texts[which].startswith("RuntimeError"))
    kind = UserError if mistake else StorageError
    fix = (
        "free disk space (or stop the other process on this run folder) and go on with resume=auto; "
        "earlier checkpoints are intact"
    )
    if TAKEN_OVER in texts[which]:
        fix = "stop this process; the newer one goes on"
    elif mistake and what is not None:
        fix = (
            "the disk is not the reason: look at the losses in metrics.jsonl and lower train.lr; earlier "
            "checkpoints are intact"
        )
    raise kind(
        f"{what or 'checkpoint ' + scratch.name.split('.')[1]} was not published: rank {which}: "
        f"{texts[which]}",
        fix,
    )
