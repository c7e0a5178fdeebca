"""A model without storage: its modules as transformers builds them, to look at before any weight is
read."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gdrt_ds.errors import UserError


def skeleton(model_config, trust_remote_code: bool = False) -> nn.Module:
    """Returns the causal LM of a config on the meta device.

    Args:
        model_config: transformers' config; it is not changed.
        trust_remote_code: whether the model's own Python files may run.

    Raises:
        UserError: transformers cannot build the model.
    """
    from transformers import AutoModelForCausalLM

    from gdrt_ds.models.attention import choose_attention
    from gdrt_ds.models.families import model_class

    attention, _ = choose_attention("auto", torch.device("cpu"), torch.float32, model_class(model_config))
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(model_config),
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"this model cannot be built: {error}", "check config.json") from None
