"""No quantization: the base is held in the dtype of the computation."""

from __future__ import annotations

import torch

from gdrt_ds.config import ModelSection
from gdrt_ds.models.quantization.base import Quantization
from gdrt_ds.models.source import dtype_name


def describe(section: ModelSection, dtype: torch.dtype) -> str:
    """The line that a run announces."""
    return f"base: {dtype_name(dtype)}, not quantised"


QUANTIZATION = Quantization(describe, loads_sharded=True)
