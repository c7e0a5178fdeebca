"""SFT-GO: cross-entropy plus lambda times the loss of the worst group.

The paper makes two groups of each sample's tokens by importance (TF-IDF, LLMLingua-2 and others). Here the
groups are those of `groups.*`, two or more, and their losses are means over the global batch, as for every
objective.
"""

import torch

from gdrt_ds.objectives.base import GroupView, Objective, mean


def token_shares(view: GroupView) -> torch.Tensor:
    """float64[G], summing to 1: plain SFT, as long as no group is known to be the worst."""
    return mean(view)[0]


def mean_and_worst(view: GroupView):
    """q = token shares + lambda at the group with the largest loss; so q sums to 1 + lambda.

    Of groups with equal losses the first is taken.
    """
    q = token_shares(view)
    worst = torch.where(view.present, view.losses, -torch.inf).argmax()
    # Not by indexing with `worst`, which would make the host wait for the device.
    is_worst = torch.arange(len(q), device=q.device) == worst
    # A batch without any token has no worst group either.
    q = q + torch.where(is_worst & view.present, view.dro.worst_weight, 0.0)
    return q, (q * torch.where(view.present, view.losses, 0.0)).sum()


OBJECTIVE = Objective(
    name="sft_go",
    source="SFT-GO: Supervised Fine-Tuning with Group Optimization, arXiv 2506.15021",
    formula="F = sum_i l_i / n + lambda max_g L_g",
    aggregate=mean_and_worst,
    needs_losses=True,
    first_weights=token_shares,
    settings=("dro.worst_weight",),
)
