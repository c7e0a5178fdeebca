"""The start number ("life") of a run.

An older process that wakes up late finds a newer number and publishes nothing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from gdrt_ds.files import process_lock
from gdrt_ds.training import durable


def begin_life(run_dir: str | Path) -> int:
    """Counts this start in RUN/life; call on rank 0 and broadcast. Leftovers of killed saves are removed."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        life = current_life(run_dir) + 1
        durable.write_atomic(run_dir / "life", json.dumps({"life": life}))
    folder = run_dir / "checkpoints"
    if folder.is_dir():
        for leftover in folder.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
    return life


def current_life(run_dir: str | Path) -> int:
    """Newest life of a run folder, 0 if it never started."""
    path = Path(run_dir) / "life"
    return json.loads(path.read_text())["life"] if path.is_file() else 0


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the lock of a run folder. The kernel releases it when its holder dies."""
    with process_lock(run_dir / ".life.lock"):
        yield
