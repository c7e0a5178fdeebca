"""Emulated 4 bits: every row of every linear weight but lm_head is rounded to 16 evenly spaced values.

Nothing becomes smaller. It shows what evenly spaced levels cost beside NF4's, whose levels follow a normal
distribution. As gdrt_ds/models/quantization/round4.py it is chosen by `model.quantization=round4`.
"""

from __future__ import annotations

import torch
from torch import nn

from gdrt_ds.config import ModelSection
from gdrt_ds.models.families import lm_head
from gdrt_ds.models.quantization.base import Quantization
from gdrt_ds.models.source import dtype_name

LARGEST = 7
"""Levels are the whole numbers from -8 to 7, times the row's scale."""


def describe(section: ModelSection, dtype: torch.dtype) -> str:
    """The line that a run announces."""
    return (
        f"base: rounded to 4 bits per value and one scale per row (emulated), stored as {dtype_name(dtype)}"
    )


def round_rows(weight: torch.Tensor) -> torch.Tensor:
    """Rounds [out, in] to the nearest level of each row."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (weight / scale).round() * scale


@torch.no_grad()
def prepare(model: nn.Module) -> None:
    """Rounds the weights in place. They are whole, because the quantization does not say `loads_sharded`."""
    output = lm_head(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not output:
            module.weight.copy_(round_rows(module.weight.float()))


QUANTIZATION = Quantization(describe, prepare=prepare)
