"""Group losses in, weights on the simplex out: pure functions, the same float64 operations on every rank.

Notation (method.md): G groups, L[G] group losses, n[G] token counts, p prior, q weights, tau temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prior(counts: Tensor, kind: str) -> Tensor:
    """Returns p over the groups present: their token shares of this global batch, or uniform.

    Args:
        counts: [G].

    Returns:
        float64[G], which sums to 1.
    """
    present = counts > 0
    weights = counts.double() if kind == "token_share" else present.double()
    return weights / weights.sum().clamp_min(1e-300)


def closed_form_weights(losses: Tensor, p: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Solves argmax_q sum q L - tau KL(q || p), which is q = p exp(L / tau) / Z.

    Args:
        losses: float64[G]; entries of groups with p = 0 are ignored (they may be NaN).
        p: float64[G] on the simplex over the groups present.
        tau: > 0; infinity is the plain mean under p.

    Returns:
        q float64[G], and the value tau log sum p exp(L / tau), float64[]. Both are exact for any tau > 0: the
        largest loss is subtracted before anything else.
    """
    kept = torch.where(p > 0, losses, -torch.inf)
    worst = kept.max()
    below = torch.where(p > 0, (kept - worst) / tau, -torch.inf)  # <= 0, whatever tau
    q = torch.softmax(p.clamp_min(1e-300).log() + below, 0)
    if tau == float("inf"):
        return q, (p * torch.where(p > 0, losses, 0.0)).sum()
    # log1p of expm1: at large tau the sum is 1 - L/tau and log would leave nothing of it
    return q, worst + tau * (p * below.expm1()).sum().log1p()


def exponentiated_gradient(q: Tensor, losses: Tensor, present: Tensor, eta: float) -> Tensor:
    """Online Group DRO (Sagawa et al. 2020): q <- q exp(eta L), renormalised.

    Groups that are absent keep their factor.
    """
    exponent = q.clamp_min(1e-300).log() + eta * torch.where(present, losses, 0.0)
    # A group must be able to come back, and `restrict` must be able to divide by what is left of the others.
    return torch.softmax(exponent, 0).clamp_min(1e-200)


def restrict(q: Tensor, present: Tensor) -> Tensor:
    """Returns q over the groups present, renormalised: an absent group has no term."""
    kept = torch.where(present, q, 0.0)
    total = kept.sum()
    return kept / torch.where(total > 0, total, 1.0)


def cvar_weights(losses: Tensor, p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Takes the worst `alpha` share of the mass p: max_q sum q L with 0 <= q <= p / alpha.

    It works for groups and for single tokens.

    Returns:
        q and the objective. alpha = 1 is the plain mean.
    """
    order = torch.argsort(torch.where(p > 0, losses, -torch.inf), descending=True, stable=True)
    mass = p[order] / alpha
    room = (1.0 - (mass.cumsum(0) - mass)).clamp_min(0.0)
    q = torch.zeros_like(p)
    q[order] = torch.minimum(mass, room)
    return q, (q * torch.where(p > 0, losses, 0.0)).sum()
