"""Closed-form Group DRO over relevance groups (arXiv 2510.10978): F = tau log sum_g p_g exp(L_g / tau)."""

from gdrt_ds import dro
from gdrt_ds.objectives.base import GroupView, Objective


def closed_form(view: GroupView):
    if view.frozen_q is not None:
        q = dro.restrict(view.frozen_q, view.present)
        return q, None if view.losses is None else (q * view.losses.where(view.present, 0.0)).sum()
    return dro.closed_form_weights(view.losses, view.prior(), view.dro.tau)


OBJECTIVE = Objective(
    name="gdrt",
    source="GDRT, WWW 2026, arXiv 2510.10978",
    formula="F = tau log sum_g p_g exp(L_g / tau); q_g = p_g exp(L_g / tau) / Z",
    aggregate=closed_form,
    needs_losses=True,
    settings=("dro.tau", "dro.prior"),
)
