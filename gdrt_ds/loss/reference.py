"""The loss in plain torch, with all [N, V] logits and torch's own autograd: the judge of the fused versions.

Shapes: N supervised tokens, H hidden, V vocabulary, G groups, r rank of a LoRA pair.
"""

from __future__ import annotations

from typing import Any

import torch

from gdrt_ds.loss.allowed import AllowedTokens


def reference_log_probs(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    *,
    bias: torch.Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    allowed: AllowedTokens | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,  # A[r, H], B[V, r], scale
    dtype: torch.dtype | None = torch.float64,
) -> torch.Tensor:  # [N, V]
    """Log-probabilities of all tokens, differentiable; the settings are those of `group_cross_entropy`.

    Args:
        dtype: of the computation; None takes the head's own, as a model would.
    """
    dtype = dtype or weight.dtype
    logits_NV = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits_NV = logits_NV + bias.to(dtype)
    if lora is not None:
        a_rH, b_Vr, scale = lora
        logits_NV = logits_NV + scale * (hidden.to(dtype) @ a_rH.to(dtype).T) @ b_Vr.to(dtype).T
    logits_NV = logits_NV * logit_scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logits_NV = logits_NV / temperature
    if allowed is not None:
        mask_NV = torch.zeros(logits_NV.shape, dtype=torch.bool)
        offsets = allowed.offsets.tolist()
        for row, node in enumerate(allowed.node.tolist()):
            mask_NV[row, allowed.tokens[offsets[node] : offsets[node + 1]].long().cpu()] = True
        logits_NV = logits_NV.masked_fill(~mask_NV.to(logits_NV.device), -torch.inf)
    return torch.log_softmax(logits_NV if dtype == torch.float64 else logits_NV.float(), dim=-1)


def reference_group_cross_entropy(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    labels: torch.Tensor,  # [N]
    groups: torch.Tensor,  # [N]
    num_groups: int,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # loss_sums[G], token_losses[N]
    """Same results as `group_cross_entropy`; `settings` are those of `reference_log_probs`."""
    log_probs_NV = reference_log_probs(hidden, weight, **settings)
    losses_N = -log_probs_NV.gather(1, labels.long().view(-1, 1)).view(-1)
    member_NG = torch.nn.functional.one_hot(groups.long(), num_groups).to(torch.float64)
    return (member_NG * losses_N.double().view(-1, 1)).sum(0), losses_N


def reference_top_k_log_probs(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    top_k: int,
    *,
    allowed: AllowedTokens | None = None,
    **settings: Any,
) -> torch.Tensor:  # [N]
    """The K-th largest log-probability of each row by a full sort; of fewer than K choices the smallest.

    `settings` are the others of `reference_log_probs`.
    """
    log_probs_NV = reference_log_probs(hidden, weight, allowed=allowed, **settings).detach()
    sorted_NV = log_probs_NV.sort(dim=1, descending=True).values
    place_N = torch.full((len(hidden),), min(top_k, len(weight)) - 1, device=hidden.device)
    if allowed is not None:
        choices_N = (allowed.offsets[1:] - allowed.offsets[:-1])[allowed.node.long()]
        place_N = choices_N.to(hidden.device).clamp(max=top_k) - 1
    return sorted_NV.gather(1, place_N.view(-1, 1)).view(-1)
