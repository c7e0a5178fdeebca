"""Folders of arrays in the cache: built once, published as a whole, mapped by every process of a machine.

One process builds while the others wait for its lock. A folder's name is a fingerprint of all that its
content depends on, so a folder never changes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gdrt_ds.files import cache_folder, process_lock, replacing


class NotKept(Exception):
    """What was built does not belong into the cache."""


def kept_folder(kind: str, key: str, write: Callable[[Path], None]) -> tuple[Path | None, str]:
    """Returns the folder of a key, which `write` fills if it is not there yet.

    Returns:
        the folder, or None and why it could not be kept.
    """
    root = cache_folder() / kind
    folder = root / key[:32]
    if folder.is_dir():
        return folder, ""
    try:
        root.mkdir(exist_ok=True)
        with process_lock(root / f".{key[:32]}.lock"):
            if folder.is_dir():  # another process has built it meanwhile
                return folder, ""
            with replacing(folder) as scratch:
                shutil.rmtree(scratch, ignore_errors=True)  # of a killed process with our number
                scratch.mkdir()
                write(scratch)
    except NotKept:
        return None, ""
    except OSError as error:
        if folder.is_dir():  # on a shared file system a process of another machine was faster
            return folder, ""
        return None, f"the cache {root} cannot be written ({error.strerror or error})"
    return folder, ""


def save_arrays(folder: Path, arrays: dict[str, np.ndarray | None]) -> None:
    """Writes one .npy for each array that is not None."""
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / f"{name}.npy", np.asarray(array))


def mapped(folder: Path, name: str) -> np.ndarray | None:
    """Returns a saved array without reading it, or None where it was None."""
    path = folder / f"{name}.npy"
    if not path.is_file():
        return None
    return np.asarray(np.load(path, mmap_mode="r"))


def write_about(folder: Path, about: dict[str, Any], name: str = "about") -> None:
    (folder / f"{name}.json").write_text(json.dumps(about), encoding="ascii")  # lone surrogates stay escaped


def read_about(folder: Path, name: str = "about") -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="ascii"))


def digest_of(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()
