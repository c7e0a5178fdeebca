"""Floating-point operations of a training step, for the share of a GPU's peak that is shown (MFU)."""

from __future__ import annotations

from torch import nn

from gdrt_ds.models.load import decoder


def training_flops_per_token(model: nn.Module) -> float:
    """Operations of forward and backward per token in the decoder's linear layers.

    A product with an [out, in] weight costs 2 * out * in operations forward, and as many again for the
    gradient of its input. A trained weight costs as many a third time, for its own gradient; a frozen base
    does not. Attention scores and the lm_head, which sees target tokens only, are left out, so the share
    that is shown is a lower bound.
    """
    flops = 0.0
    for layer in decoder(model).modules():
        if isinstance(layer, nn.Linear):
            passes = 3 if layer.weight.requires_grad else 2
            flops += passes * 2.0 * layer.in_features * layer.out_features
    return flops
