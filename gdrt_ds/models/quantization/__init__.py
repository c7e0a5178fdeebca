"""Quantizations of the frozen base: one file each, chosen by `model.quantization`.

To add one, put one file into this folder that binds `QUANTIZATION` (docs/extending.md).
"""

from __future__ import annotations

from gdrt_ds import registry
from gdrt_ds.models.quantization.base import Quantization, Setting, storage_dtype

__all__ = ["Quantization", "Setting", "get_quantization", "storage_dtype"]


def get_quantization(name: str) -> Quantization:
    """Returns the quantization of a file of this folder.

    Raises:
        UserError: there is no such quantization; the message gives the nearest name.
    """
    return registry.find_part(__name__, "QUANTIZATION", name, "model.quantization")
