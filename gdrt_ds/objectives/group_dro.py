"""Online exponentiated-gradient Group DRO (Sagawa et al., ICLR 2020).

First q <- q exp(eta L), then F = sum_g q_g L_g.
"""

from gdrt_ds import dro
from gdrt_ds.objectives.base import GroupView, Objective


def weights(view: GroupView):
    """With estimate=batch the update uses this batch's losses before the gradient, as in the paper.

    With ema the last state's.
    """
    q = view.state.q
    if view.dro.estimate == "batch":
        q = dro.exponentiated_gradient(q, view.losses, view.present, view.dro.eta)
    q = dro.restrict(q, view.present)
    return q, None if view.losses is None else (q * view.losses.where(view.present, 0.0)).sum()


def remember(view: GroupView) -> None:
    view.state.q = dro.exponentiated_gradient(view.state.q, view.losses, view.present, view.dro.eta)


OBJECTIVE = Objective(
    name="group_dro",
    source="Sagawa et al., Distributionally Robust Neural Networks, ICLR 2020",
    formula="q <- q exp(eta L) / Z; F = sum_g q_g L_g",
    aggregate=weights,
    needs_losses=True,
    remember=remember,
    settings=("dro.eta",),
)
