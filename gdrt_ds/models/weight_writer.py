"""Writes safetensors files tensor by tensor, so that no file has to be in memory.

safetensors' own writer wants every tensor of a file at once. Here the header is written first, because shapes
and types are known, and then the values of one tensor after the other. Files and index are, byte for byte,
those of transformers' save_pretrained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdrt_ds.errors import UserError
from gdrt_ds.models.weight_files import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16]
ORDER += [torch.int32, torch.float32, torch.float64, torch.int64]
"""Types as safetensors sorts them: a file begins with those of the highest rank, so that values are
aligned."""


@dataclass(frozen=True)
class TensorShape:
    """What is known of a tensor before its values are computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        size = torch.empty((), dtype=self.dtype).element_size()
        for length in self.shape:
            size *= length
        return size


def shard_bytes(text: str) -> int:
    """Returns the bytes of a size such as `4GB` or `500MB`.

    Raises:
        UserError: it is no such size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT])B\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2].upper()))) if found else 0
    if size < 1:
        raise UserError(
            f"--shard-size {text} is no size of a file", "give a number and KB, MB, GB or TB, e.g. 4GB"
        )
    return size


def write_weights(
    folder: Path,
    tensors: dict[str, TensorShape],
    values: Callable[[str], Iterable[Tensor]],
    shard_size: str,
    num_parameters: int,
) -> list[str]:
    """Writes model.safetensors, or shards and their index.

    Args:
        folder: an existing folder.
        tensors: what is written, in the order in which shards are filled.
        values: name -> its flat values in order, in one piece or several, in the dtype that `tensors` states.
        shard_size: largest size of one file, e.g. `4GB`. A larger tensor gets a file of its own.
        num_parameters: for the index.

    Returns:
        the names of the files.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes(shard_size),
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: tensors[name] for name in names}, values)
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": num_parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return list(split.filename_to_tensors)


def write_file(
    path: Path, tensors: dict[str, TensorShape], values: Callable[[str], Iterable[Tensor]]
) -> None:
    """Writes one safetensors file.

    Raises:
        ValueError: `values` gave another number of bytes than the shape says.
    """
    names = sorted(tensors, key=lambda name: (-ORDER.index(tensors[name].dtype), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + tensors[name].num_bytes
        entries[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
        start = end
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for name in names:
            written = 0
            for piece in values(name):
                flat = piece.detach().contiguous().reshape(-1).view(torch.uint8)
                written += stream.write(memoryview(flat.numpy()))
                del piece, flat  # the next values are computed without these in memory
            if written != tensors[name].num_bytes:
                raise ValueError(f"{name}: {written} bytes for a tensor of {tensors[name].num_bytes}")
