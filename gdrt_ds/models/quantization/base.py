"""What a quantization says of itself. Each file beside this one is one and binds `QUANTIZATION`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gdrt_ds.config import ModelSection


@dataclass(frozen=True)
class Setting:
    """What a quantization is checked against before any weight is loaded.

    Attributes:
        model: settings of the model.
        dtype: dtype of the computation.
        deepspeed_config: the DeepSpeed config; "auto" values may still be in it.
        cuda: whether there is a GPU.
        versions: package -> version, of deepspeed and bitsandbytes.
    """

    model: ModelSection
    dtype: torch.dtype
    deepspeed_config: dict[str, Any]
    cuda: bool
    versions: dict[str, str]


def nothing_to_refuse(setting: Setting) -> Iterator[tuple[str, str]]:
    """Every setting goes with this quantization."""
    return iter(())


def loaded_as_it_is(section: ModelSection, dtype: torch.dtype) -> None:
    """transformers loads the weights without a quantiser."""


def already_prepared(model: nn.Module) -> None:
    """The modules are ready as they were loaded."""


def already_plain(model: nn.Module) -> nn.Module:
    """The modules are ordinary ones that hold the values they compute with."""
    return model


@dataclass(frozen=True)
class Quantization:
    """One way to hold the frozen base in memory.

    Attributes:
        describe: (section, dtype) -> the line that a run announces, e.g. `base: NF4, stored as uint8`.
        bytes_of: (section, dtype, values) -> bytes of the packed weights, and bytes of what comes with them
            (scales). The memory plan uses it for the linear layers other than lm_head; None = not quantised.
        refusals: the combinations of settings that compute wrong results or fail: (problem, fix) of each.
        transformers_config: (section, dtype) -> the quantization_config of transformers, or None.
        prepare: called with the loaded model before the adapter is added. It changes modules or weights in
            place.
        dequantise: turns the model, in place, into one of ordinary modules with the same values, for export.
        loads_sharded: each rank can read and quantise its own slice (sharded_loading.py). Otherwise every
            rank first loads the whole model, and `prepare` sees whole weights.
    """

    describe: Callable[[ModelSection, torch.dtype], str]
    bytes_of: Callable[[ModelSection, torch.dtype, int], tuple[int, int]] | None = None
    refusals: Callable[[Setting], Iterator[tuple[str, str]]] = nothing_to_refuse
    transformers_config: Callable[[ModelSection, torch.dtype], Any] = loaded_as_it_is
    prepare: Callable[[nn.Module], None] = already_prepared
    dequantise: Callable[[nn.Module], nn.Module] = already_plain
    loads_sharded: bool = False


def storage_dtype(section: ModelSection) -> torch.dtype:
    """Returns the dtype in which packed weights are stored.

    `auto` is uint8: the engine casts floating tensors to its own dtype, and leaves bytes alone.
    """
    if section.quant_storage == "auto":
        return torch.uint8
    return getattr(torch, section.quant_storage)
