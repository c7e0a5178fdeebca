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


def own_build_folder() -> None:
    """Gives torch a folder of this environment, unless TORCH_EXTENSIONS_DIR names one; removes old locks.

    A build that was killed leaves its lock behind, for which every later start would wait forever.
    """
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(_folder_of_environment())
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        with contextlib.suppress(OSError):
            age = time.time() - lock.stat().st_mtime
            if age > STALE_LOCK_S:
                lock.unlink()
            elif os.environ.get("LOCAL_RANK", "0") == "0":
                print(
                    f"build: waiting for a process that builds DeepSpeed's CPU extension since {age:.0f} s; "
                    f"if it was killed, remove {lock}",
                    file=sys.stderr,
                    flush=True,
                )


def _folder_of_environment() -> Path:
    about = f"{sys.prefix} {torch.__version__} {metadata.version('deepspeed')}"
    key = hashlib.sha256(about.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "torch_extensions" / f"gdrt_ds_{key}"
