"""How the frozen base is quantised: the settings that transformers and the sharded loading share."""

from __future__ import annotations

import torch

from gdrt_ds.config import ModelSection


def quantization_config(section: ModelSection, dtype: torch.dtype):
    """transformers' BitsAndBytesConfig for NF4, or None."""
    if section.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=quant_storage(section),
    )


def quant_storage(section: ModelSection) -> torch.dtype:
    """auto is uint8: the engine casts floating tensors to its own dtype, bytes it leaves alone."""
    return torch.uint8 if section.quant_storage == "auto" else getattr(torch, section.quant_storage)
