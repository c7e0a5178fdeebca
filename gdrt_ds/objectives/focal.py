"""Focal loss: hard-token upweighting without groups; the control for "groups only track difficulty"."""

from gdrt_ds.objectives.base import Objective, TokenView


def focal_term(view: TokenView):
    return (-(-view.losses).expm1()).clamp_min(0.0) ** view.options.focal_gamma * view.losses


OBJECTIVE = Objective(
    name="focal",
    source="Lin et al., Focal Loss for Dense Object Detection, ICCV 2017",
    formula="F = mean_i (1 - p_i)^gamma l_i",
    token_term=focal_term,
)
