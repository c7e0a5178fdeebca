"""Focal loss: hard-token upweighting without groups; the control for "groups only track difficulty"."""

import torch
from torch import Tensor

from gdrt_ds.objectives.base import Objective, TokenView


def focal_term(view: TokenView) -> Tensor:
    """float[N]: (1 - p)^gamma times the loss."""
    missing = (-(-view.losses).expm1()).clamp_min(0.0)
    gamma = view.options.focal_gamma
    if not 0 < gamma < 1:
        return missing**gamma * view.losses
    # Below gamma = 1 the power is infinitely steep at 0. Autograd makes NaN of infinity times a loss of 0.
    # The term itself goes with loss^(1 + gamma) there, so its slope at 0 is 0.
    certain = missing < torch.finfo(missing.dtype).tiny
    weight = torch.where(certain, 1.0, missing) ** gamma
    return torch.where(certain, 0.0, weight) * view.losses


OBJECTIVE = Objective(
    name="focal",
    source="Lin et al., Focal Loss for Dense Object Detection, ICCV 2017",
    formula="F = mean_i (1 - p_i)^gamma l_i",
    token_term=focal_term,
    settings=("options.focal_gamma",),
)
