"""Chooses how samples are packed, and says why."""

from __future__ import annotations

from gdrt_ds.config import RunConfig
from gdrt_ds.errors import UserError


def choose_packing(config: RunConfig, model_config) -> tuple[str, str]:
    """(packing, line to announce).

    Raises:
        UserError: packing asked for where the model's attention cannot follow it.
    """
    capped = getattr(model_config.get_text_config(), "attn_logit_softcapping", None) is not None
    wanted, flash = config.train.packing, config.model.attention.startswith("flash")
    if wanted == "auto":
        if capped:
            return "none", "packing: none (auto: the model soft-caps its attention)"
        if config.model.attention in ("eager", "flex_attention") or flash:
            return "none", f"packing: none (auto: model.attention={config.model.attention} is set)"
        return (
            "shared_prefix",
            "packing: shared_prefix (auto: no padding, the prompt's constant head once per micro-batch)",
        )
    if wanted != "none" and (capped or flash or config.model.attention in ("eager", "flex_attention")):
        raise UserError(
            f"train.packing = {wanted} needs the tree attention, but "
            + (
                "the model soft-caps its attention"
                if capped
                else f"model.attention = {config.model.attention} is set"
            ),
            "set train.packing=none, or model.attention=auto",
        )
    return wanted, f"packing: {wanted} (as set)"
