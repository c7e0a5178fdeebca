"""Conditional value at risk: the mean loss of the worst alpha share of tokens or groups (`dro.cvar_over`)."""

from gdrt_ds import dro
from gdrt_ds.objectives.base import GroupView, Objective


def worst_share(view: GroupView):
    return dro.cvar_weights(view.losses, view.prior(), view.dro.alpha)


OBJECTIVE = Objective(
    name="cvar",
    source="Rockafellar & Uryasev 2000; Williamson & Menon, Fairness Risk Measures, ICML 2019",
    formula="F = max_q sum q l, 0 <= q <= p / alpha",
    aggregate=worst_share,
    needs_losses=True,
    per_token=lambda section: section.cvar_over == "tokens",
    settings=("dro.alpha", "dro.cvar_over", "dro.prior"),
)
