"""Where DeepSpeed's small CPU extension is built: once per environment, not once for all.

torch keeps one folder per user. Two environments then rebuild the extension in turns, and all ranks of both
wait for each other's compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

STALE_LOCK_S = 900
"""A build takes a minute; a lock of this age belongs to a build that was killed."""
POLL_S = 1.0


def own_build_folder() -> None:
    """Gives torch a folder of this environment, unless TORCH_EXTENSIONS_DIR names one; waits for its builds.

    A build that was killed leaves its lock behind, for which torch would wait forever. Here such a lock is
    removed as soon as it is old.
    """
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(_folder_of_environment())
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        _wait_for(lock)


def _wait_for(lock: Path) -> None:
    """Returns when the lock is gone; removes it when it is old."""
    told = os.environ.get("LOCAL_RANK", "0") != "0"
    with contextlib.suppress(OSError):  # gone, or another rank's
        while True:
            age = time.time() - lock.stat().st_mtime
            if age > STALE_LOCK_S:
                lock.unlink()
                return
            if not told:
                print(
                    f"build: waiting for a process that builds DeepSpeed's CPU extension since {age:.0f} s; "
                    f"if it was killed, remove {lock}, or wait: after {STALE_LOCK_S} s it is removed",
                    file=sys.stderr,
                    flush=True,
                )
                told = True
            time.sleep(POLL_S)


def _folder_of_environment() -> Path:
    about = f"{sys.prefix} {torch.__version__} {metadata.version('deepspeed')}"
    key = hashlib.sha256(about.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "torch_extensions" / f"gdrt_ds_{key}"
