"""Says once in a run when one group takes nearly all the weight, and what a larger `dro.tau` would give it.

Where group losses differ by several nats, a tau of 1 is nearly the worst group alone: it had .91 of the
weight on Amazon Office titles, and all other tokens paid (docs/choosing.md). Nothing is changed here: tau
is the user's choice.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from gdrt_ds import dro, objectives
from gdrt_ds.config import RunConfig
from gdrt_ds.objectives.gdrt import closed_form

SPAN, FEWEST = (
    20,
    5,
)  # steps that are looked at; a shorter run is judged at its end, one of fewer than FEWEST not at all
DOMINANT = 0.8  # mean weight of one group from which it is said ...
# ... if its share under the prior is below this, which is also what the tau that is named would leave it
# at most
EVEN = 0.5
FACTORS = (2, 3, 5, 10, 20, 30, 50, 100)


def weights_at(q: np.ndarray, p: np.ndarray, tau: float, new_tau: float) -> np.ndarray:
    """Closed-form weights of the same losses at another temperature: q'_g is proportional to p_g (q_g /
    p_g)^(tau / new_tau).

    Follows from q_g = p_g exp(L_g / tau) / Z without knowing which losses (excess, moving averages) were
    weighed.

    Args:
        q, p: float64[..., G] weights and prior on the simplex; groups with p = 0 are absent.
    """
    present = p > 0
    logits = np.full(p.shape, -np.inf)
    logits[present] = np.log(p[present]) + tau / new_tau * (
        np.log(np.maximum(q[present], 1e-300)) - np.log(p[present])
    )
    unnormalised = np.exp(logits - logits.max(-1, keepdims=True))
    return unnormalised / unnormalised.sum(-1, keepdims=True)


class WeightWatch:
    """Fed with the records of metrics.jsonl; active for objectives with closed-form weights and a tau."""

    def __init__(self, config: RunConfig, total_steps: int):
        self.section, self.total = config.dro, total_steps
        closed = objectives.get_objective(config.objective).aggregate is closed_form
        self.active = closed and self.section.frozen_weights is None and math.isfinite(self.section.tau)
        self.weights: list[list[float]] = []
        self.priors: list[list[float]] = []

    def add(self, record: dict) -> str | None:
        """Takes a step's record (plain numbers); returns the one line to say, at most once."""
        if not self.active:
            return None
        if not record["skipped"]:
            counts = torch.tensor([count or 0.0 for count in record["group_count"]], dtype=torch.float64)
            self.weights.append([weight or 0.0 for weight in record["group_weight"]])  # null: an absent group
            self.priors.append(dro.prior(counts, self.section.prior).tolist())
        ended = record["step"] >= self.total
        if len(self.weights) < (FEWEST if ended else SPAN):
            return None
        self.active = False
        return self._verdict(np.asarray(self.weights, float), np.asarray(self.priors, float))

    def _verdict(self, q: np.ndarray, p: np.ndarray) -> str | None:
        """q, p: float64[steps, G]."""
        group, tau = int(q.mean(0).argmax()), self.section.tau
        share, fair = float(q[:, group].mean()), float(p[:, group].mean())
        if share < DOMINANT or fair >= EVEN:
            return None
        told = (
            f"weights: group {group + 1} took {share:.2f} of the weight in {len(q)} steps (prior "
            f"{fair:.2f}): dro.tau = {tau:g} is small for these losses"
        )
        for factor in FACTORS:
            left = float(weights_at(q, p, tau, tau * factor)[:, group].mean())
            if left <= EVEN:
                return (
                    f"{told}; dro.tau={tau * factor:g} would give it {left:.2f} (docs/choosing.md). Nothing "
                    "is changed"
                )
        return f"{told}, by a factor of more than {FACTORS[-1]} (docs/choosing.md). Nothing is changed"
