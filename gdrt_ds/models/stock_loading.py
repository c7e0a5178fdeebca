"""transformers' own loading: every rank reads the whole model (under ZeRO-3 see sharded_loading.py)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gdrt_ds.config import ModelSection
from gdrt_ds.errors import UserError
from gdrt_ds.models.quantization import get_quantization
from gdrt_ds.models.source import first_line
from gdrt_ds.models.stored_four_bit import stored_four_bit
from gdrt_ds.models.weight_files import weight_paths


def load_stock(
    path: Path, config, section: ModelSection, dtype: torch.dtype, attention: str, device: torch.device
) -> nn.Module:
    """Loads the whole (quantised) model onto this rank's device.

    Args:
        path: folder of the base.
        config: its transformers config.
        section: settings of the model.
        dtype: dtype of the computation.
        attention: transformers' name of the attention.
        device: where the weights go.

    Raises:
        UserError: weights are unreadable, truncated or missing, or they are not safetensors.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    weight_paths(path)  # pickles are not read
    quantization_config = None
    if stored_four_bit(config) is None:  # else the config of the folder says how its weights are packed
        quantization_config = get_quantization(section.quantization).transformers_config(section, dtype)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            quantization_config=quantization_config,
            attn_implementation=attention,
            device_map={"": str(device)},
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model folder {path} cannot be loaded ({type(error).__name__}: {first_line(error)})",
            "check that its files are complete (sizes, safetensors index) and that this transformers knows "
            "the architecture",
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"model folder {path} lacks {len(missing)} weights, e.g. {missing[0]}",
            "the download is incomplete, or config.json belongs to another model",
        )
    return model
