"""Failures in words: what a command says and which status it ends with when something goes wrong.

A UserError, and a failure of the machine that `explain` knows, become one message without a traceback.
Anything else is a bug: a traceback and status 1.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator

import torch
import torch.distributed as dist

from gdrt_ds.errors import LostPeer, StorageError, UserError
from gdrt_ds.files import written_file
from gdrt_ds.runtime.ranks import detect_rank

OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Words of a RuntimeError that means memory ran out."""

LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out",
    "timeout",
    "socket closed",
    "recvvalue failed",
    "remote process exited",
    "connection refused",
    "application timeout",
)
"""Words, in small letters, of an error of a collective that means another rank is gone."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a file system that takes nothing more."""

MEMORY_FIX = "a smaller batch, shorter prompts or more ranks need less"


def explain(error: BaseException, memory_fix: str = MEMORY_FIX) -> UserError | None:
    """Puts the failures of a machine into words: out of memory, a dead or hung peer, a full disk.

    Args:
        memory_fix: what a user of this command can change when memory runs out.

    Returns:
        a UserError; the error itself if it is one; None for anything else.
    """
    if isinstance(error, UserError):
        return error
    text = str(error).strip()
    first_line = text.splitlines()[0] if text else ""
    first = f"{type(error).__name__}: {first_line}"[:300]
    if _is_out_of_memory(error, text):
        place = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "the host"
        return UserError(f"out of memory on {place} ({first})", memory_fix)
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return StorageError(
            f"{written_file(error)} cannot be written ({error.strerror})",
            "free disk space and go on with resume=auto; published checkpoints are intact",
        )
    if _is_lost_peer(error, text):
        return LostPeer(
            f"a peer is dead or hung: {first}",
            "the first rank that failed says why in its own output; resume=auto goes on from the newest "
            "valid checkpoint; train.timeout_s sets how long ranks wait for each other",
        )
    return None


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)


def _is_lost_peer(error: BaseException, text: str) -> bool:
    if not dist.is_initialized() or not isinstance(error, (dist.DistError, RuntimeError)):
        return False
    return any(words in text.lower() for words in LOST_PEER)


@contextlib.contextmanager
def report_user_errors(*, interrupted: str = "", memory_fix: str = MEMORY_FIX) -> Iterator[None]:
    """Stands around a command's main and turns failures into one message and an exit status, on every rank.

    Failures that nobody has words for end with a traceback and status 1, at once, so that no peer waits for
    this rank.

    Args:
        interrupted: what a user who interrupts this command is told about what is saved; empty: nothing.
        memory_fix: passed on to `explain`.
    """
    # bitsandbytes advises, when it is imported, to install a kernel for inference that training does not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}" if interrupted else "interrupted", file=sys.stderr, flush=True)
        code = 128 + signal.SIGINT
    except Exception as error:
        told = explain(error, memory_fix)
        if told is None and not dist.is_initialized():
            raise
        if told is None:
            traceback.print_exc()
            code = 1
        else:
            print(_message(told, error), file=sys.stderr, flush=True)
            code = told.status
    else:
        return
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)  # a peer may wait in a collective: interpreter shutdown would wait with it
    sys.exit(code)


def _message(told: UserError, error: Exception) -> str:
    """What this rank prints: the whole of it once, if all ranks have the same to say."""
    rank = detect_rank()["rank"]
    if told is not error:  # a failure of this rank's machine
        return f"error: rank {rank}: {told}"
    if rank != 0:  # a user's mistake is the same on every rank, and rank 0 tells the fix
        return f"error on rank {rank}: {told.problem}"
    return f"error: {told}"
