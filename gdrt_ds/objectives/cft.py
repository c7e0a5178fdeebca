"""Counterfactual fine-tuning: cross-entropy plus that of (logits - logits without history).

The second term is weighted along the title. For a linear head the difference of logits is the head applied to
the difference of hidden states, so this term costs one more fused pass and never builds logits.
"""

import torch

from gdrt_ds.objectives.base import Objective, TokenView


def counterfactual_term(view: TokenView):
    """Position weights fall linearly from 1 at the first target token to beta at the last."""
    share = view.position / (view.length - 1).clamp_min(1)
    weight = 1.0 + (view.options.cft_beta - 1.0) * share.to(torch.float32)
    return view.losses + view.options.cft_alpha * weight * view.counterfactual


OBJECTIVE = Objective(
    name="cft",
    source="CFT, Causality-Enhanced Behavior Sequence Modeling in LLMs for Recommendation, arXiv 2410.22809",
    formula="F = mean_i l_i + alpha w_i CE(logits - logits_without_history)",
    token_term=counterfactual_term,
    history_free_pass=True,
    settings=("options.cft_alpha", "options.cft_beta"),
)
