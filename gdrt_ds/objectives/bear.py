"""BEAR: a masked softmax whose target tokens weigh by how they stand against the beam search's K-th token.

A beam search of K beams drops a title as soon as one of its tokens is not among the K best. With m = log
p_target - log p_K, where p_K is the K-th largest probability among the catalogue's next tokens (the smallest
where there are fewer), a token weighs

    w = 1 + lambda * sigmoid(m / xi)     options.bear_favours=kept: tokens that stay weigh more
    w = 1 + lambda * sigmoid(-m / xi)    options.bear_favours=at_risk: tokens that are dropped weigh more

The first sign is that of the authors' code (Tiny-Snow/BEAR-SIGIR-2026, train_bear.py), and the default. The
second follows the abstract, which wants to lower the risk of pruning: it is the gradient of the penalty
softplus(-m / xi), up to a factor. We could read the code and the abstract, not the paper's full text.

Weights carry no gradient. Places with one possible token have loss 0 and weight 0, as in the authors' code.
Their code normalises the weights in each micro-batch; here their sum is that of the global batch.
"""

import torch
from torch import Tensor

from gdrt_ds.objectives.base import Objective, TokenView


def beam_weights(view: TokenView) -> Tensor:
    """float64[N], 0 where the catalogue leaves no choice."""
    options = view.options
    margin = -view.losses.detach().double() - view.top_k_log_probs.double()
    if options.bear_favours == "at_risk":
        margin = -margin
    weights = 1.0 + options.bear_lambda * torch.sigmoid(margin / options.bear_xi)
    return torch.where(view.num_choices > 1, weights, 0.0)


OBJECTIVE = Objective(
    name="bear",
    source="BEAR, SIGIR 2026, arXiv 2601.22925; weights as in its authors' code",
    formula="F = sum w l / sum w, l as in msl, w_i = 1 + lambda sigmoid((log p_i - log p_K) / xi)",
    masked_softmax=True,
    top_k=lambda options: options.bear_k,
    live_weights=beam_weights,
    settings=(
        "options.bear_lambda",
        "options.bear_xi",
        "options.bear_k",
        "options.bear_favours",
        "options.msl_temperature",
    ),
)
