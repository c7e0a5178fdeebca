"""Writes that survive a power cut: every file and folder is synced before anything relies on it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from gdrt_ds.files import set_usual_mode


def remove(path: Path) -> None:
    """Removes a folder, out of sight first, so that a half-removed one is never taken for a checkpoint."""
    hidden = path.with_name(f".removed_{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    set_usual_mode(path)
    fsync(path)


def write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def write_atomic(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    write_text(scratch, text)
    rename(scratch, path)
    fsync(path.parent)


def rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
