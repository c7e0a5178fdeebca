"""Checkpoints whose weights are bitsandbytes 4-bit already: they are read as they are, never quantised again.

Such a folder says so in config.json (`quantization_config`, `load_in_4bit`), and beside each packed weight it
stores the scales: `NAME.absmax`, `NAME.quant_map`, `NAME.quant_state.bitsandbytes__nf4`, and `NAME.nested_*`
under double quantisation. Type, block size and double quantisation are those of the checkpoint; the settings
`model.double_quant` and `model.quant_storage` do not apply.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from gdrt_ds.config import ModelSection
from gdrt_ds.errors import UserError
from gdrt_ds.models.weight_files import WeightFiles


@dataclass(frozen=True)
class StoredFourBit:
    """How a checkpoint's weights are packed.

    Attributes:
        quant_type: `nf4` or `fp4`.
        double: whether the scales are quantised, too.
        storage: dtype of the packed weights.
        plain: names of modules that are not packed; None = lm_head, as transformers does by itself.
    """

    quant_type: str
    double: bool
    storage: torch.dtype
    plain: tuple[str, ...] | None = None

    def describe(self, dtype: torch.dtype) -> str:
        """The line that a run announces."""
        double = " with double quantisation" if self.double else ""
        return (
            f"base: {self.quant_type.upper()}{double} as the checkpoint stores it, not quantised again, "
            f"computed in {_name(dtype)}"
        )


def stored_four_bit(config) -> StoredFourBit | None:
    """Reads it from transformers' config of a folder; None if its weights are not bitsandbytes 4-bit."""
    stored = getattr(config, "quantization_config", None)
    if stored is not None and not isinstance(stored, dict):
        stored = stored.to_dict()
    if not stored or not stored.get("load_in_4bit"):
        return None
    plain = stored.get("llm_int8_skip_modules")
    storage = str(stored.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    return StoredFourBit(
        str(stored.get("bnb_4bit_quant_type", "fp4")),
        bool(stored.get("bnb_4bit_use_double_quant", False)),
        getattr(torch, storage),
        None if plain is None else tuple(plain),
    )


def check_stored(config, section: ModelSection, dtype: torch.dtype) -> None:
    """Refuses a 4-bit checkpoint that cannot be used as it is. Nothing happens for other folders.

    Raises:
        UserError: the settings ask for another base, the engine would destroy the packed weights, or the
            output head is packed.
    """
    stored = stored_four_bit(config)
    if stored is None:
        return
    if section.quantization != "nf4":
        raise UserError(
            f"model.quantization = {section.quantization}, and {section.path} holds 4-bit weights",
            "set model.quantization=nf4: they are read as they are",
        )
    if stored.storage not in (torch.uint8, dtype):
        raise UserError(
            f"{section.path} stores its 4-bit weights as {_name(stored.storage)}: with {_name(dtype)} "
            "arithmetic the engine casts them and destroys them silently (peft #2016; bitsandbytes #1249)",
            f"set model.dtype={_name(stored.storage)}",
        )
    if stored.plain is not None and not any("lm_head" in name for name in stored.plain):
        raise UserError(
            f"{section.path} stores its lm_head in 4 bits, whose rows neither the fused loss nor the "
            "evaluation can read",
            "use a checkpoint whose lm_head is not quantised (llm_int8_skip_modules=['lm_head'])",
        )


def compute_in(config, section: ModelSection, dtype: torch.dtype):
    """Returns the config of a 4-bit checkpoint, changed so that it computes in `dtype`.

    Raises:
        UserError: see `check_stored`.
    """
    check_stored(config, section, dtype)
    config = copy.deepcopy(config)
    if not isinstance(config.quantization_config, dict):
        config.quantization_config = config.quantization_config.to_dict()
    config.quantization_config["bnb_4bit_compute_dtype"] = _name(dtype)
    return config


def is_packed(files: WeightFiles, name: str) -> bool:
    """Whether a stored tensor is a packed weight with its scales beside it."""
    return any(key.startswith(f"{name}.quant_state.bitsandbytes__") for key in files.tensors)


def read_quant_state(files: WeightFiles, name: str, device: torch.device):
    """Returns bitsandbytes' QuantState of a packed weight, from the tensors stored beside it."""
    from bitsandbytes.functional import QuantState

    parts = {}
    for key, location in files.tensors.items():
        if key.startswith(name + "."):
            parts[key.removeprefix(name + ".")] = files.read(key).view(location.shape)
    return QuantState.from_dict(parts, device=device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
