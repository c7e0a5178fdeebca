"""The fingerprint of a frozen base: a run resumes only on the weights it was made with, adapters likewise."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from gdrt_ds.config import ModelSection
from gdrt_ds.models.quantization.base import storage_dtype
from gdrt_ds.models.weight_files import weight_paths

WINDOW_BYTES = 1 << 16
WINDOWS = 64


def base_fingerprint(
    path: Path, section: ModelSection | None = None, dtype: torch.dtype | None = None
) -> str:
    """Returns a SHA-256 over the frozen base and over how it is stored.

    Of every weight file it covers the size, the header and 64 windows of 64 KiB that are spread over the
    file. Small files are covered whole. Of a 140 GB model 4 MiB per file are read, which a different or
    retrained model cannot match.

    Args:
        path: folder of the base.
        section: settings of the model; None leaves the form of storage out.
        dtype: dtype of the computation.
    """
    digest = hashlib.sha256()
    for file in weight_paths(path):
        _add_file(digest, file)
    if section is not None:
        # The list is part of checkpoints that users keep: a change of it would refuse their resumption.
        stored = [section.quantization, section.double_quant, str(storage_dtype(section)), str(dtype)]
        digest.update(json.dumps(stored).encode())
    return digest.hexdigest()


def _add_file(digest, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name}:{size}:".encode())
    with open(file, "rb") as handle:
        header = int.from_bytes(handle.read(8), "little")
        digest.update(handle.read(min(header, size)))
        step = max((size - WINDOW_BYTES) // WINDOWS, WINDOW_BYTES)
        for start in [*range(0, size, step), max(size - WINDOW_BYTES, 0)]:
            handle.seek(start)
            digest.update(handle.read(WINDOW_BYTES))
