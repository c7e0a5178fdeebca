"""Chooses how the samples of a micro-batch are put into rows, and says why.

Whether rows can be packed depends on the model and on its attention, so the choice stands here and not beside
the batches: packed rows need the tree attention, which builds on SDPA.
"""

from __future__ import annotations

from gdrt_ds.config import RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.models.attention import get_backend
from gdrt_ds.models.families import soft_caps_attention


def choose_packing(config: RunConfig, model_config) -> tuple[str, str]:
    """Returns `none`, `packed` or `shared_prefix`, and the line to announce.

    Args:
        config: settings of the run; `train.packing` is the wish.
        model_config: transformers' config of the model.

    Raises:
        UserError: packed rows are asked for where the model's attention cannot follow them.
    """
    wanted = config.train.packing
    obstacle = _obstacle(config.model.attention, model_config)
    if wanted == "auto" and obstacle:
        return "none", f"packing: none (auto: {obstacle})"
    if wanted == "auto":
        line = "packing: shared_prefix (auto: no padding, the prompt prefix once per micro-batch)"
        return "shared_prefix", line
    if wanted != "none" and obstacle:
        raise UserError(
            f"train.packing = {wanted} needs the tree attention, but {obstacle}",
            "set train.packing=none, or model.attention=auto",
        )
    return wanted, f"packing: {wanted} (as set)"


def _obstacle(attention: str, model_config) -> str:
    """Returns why rows cannot be packed, empty if they can."""
    if soft_caps_attention(model_config):
        return "the model soft-caps its attention"
    if attention == "auto" or get_backend(attention).packs:
        return ""
    return f"model.attention = {attention} is set"
