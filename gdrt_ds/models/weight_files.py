"""Reads any range of any tensor straight out of safetensors files, without mapping or loading the rest.

A memory map would count every touched page of a 140 GB model as this process's memory; here exactly the
asked bytes are read. The header is plain JSON (little-endian length, then name -> dtype, shape, offsets),
checked against the file size.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdrt_ds.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorLocation:
    """Where one tensor lies: file, first byte, type and shape."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def weight_paths(folder: str | Path) -> list[Path]:
    """The weight files of a model folder, those that transformers loads.

    It takes model.safetensors, else the shards of the index. Others that lie there, e.g. a copy or another
    precision, are not the model.

    Raises:
        UserError: neither is there, the index is not readable, or a shard is missing.
    """
    folder = Path(folder)
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        raise UserError(
            f"model folder {folder} has no model.safetensors and no model.safetensors.index.json"
            + (f", but {', '.join(others[:3])}" if others else ""),
            "save the model there with transformers' save_pretrained; pickles and other names are not read",
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise UserError(
            f"{index} is not readable as a safetensors index", "download the model again"
        ) from None
    files = [folder / name for name in names]
    missing = [f.name for f in files if not f.is_file() or f.parent != folder]
    if missing:
        raise UserError(
            f"model folder {folder} lacks {len(missing)} weight files, e.g. {missing[0]}",
            "complete the download",
        )
    return files


class WeightFiles:
    """All tensors of a model folder.

    Raises (on construction):
        UserError: see `weight_paths`; a truncated or malformed file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.tensors: dict[str, TensorLocation] = {}
        for file in weight_paths(folder):
            self.tensors.update(_read_header(file))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Values [start, stop) of the flattened tensor, 1-D, in the stored dtype."""
        location = self.tensors[name]
        stop = location.numel if stop is None else stop
        if not 0 <= start <= stop <= location.numel:
            raise ValueError(f"{name}: range [{start}, {stop}) of {location.numel} values")
        size = torch.empty((), dtype=location.dtype).element_size()
        values = torch.empty(stop - start, dtype=location.dtype)
        if stop == start:
            return values
        target = memoryview(values.view(torch.uint8).numpy())
        with open(location.file, "rb", buffering=0) as handle:
            handle.seek(location.start + start * size)
            done = 0
            while done < len(target):
                count = handle.readinto(target[done:])
                if not count:
                    raise UserError(
                        f"{location.file} ended while {name} was read",
                        "the file is being changed or is truncated; copy it again",
                    )
                done += count
        return values


def _read_header(file: Path) -> dict[str, TensorLocation]:
    size = os.path.getsize(file)
    fix = "the download is incomplete or the file is damaged; fetch it again"
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise UserError(
                f"{file} is not a readable safetensors file (header of {length} bytes in a file of {size})",
                fix,
            )
        try:
            header = json.loads(handle.read(length))
        except ValueError:
            raise UserError(
                f"{file} is not a readable safetensors file (its header is not JSON)", fix
            ) from None
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{file}: tensor {name} has a header entry that is not understood ({str(entry)[:80]})",
                "set model.loading to stock, or store the model in bfloat16, float16 or float32",
            ) from None
        expected = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        if end - begin != expected or begin < 0 or 8 + length + end > size:
            raise UserError(
                f"{file} is truncated or damaged: {name} ends at byte {8 + length + end} of {size}", fix
            )
        found[name] = TensorLocation(file, 8 + length + begin, dtype, shape)
    return found
