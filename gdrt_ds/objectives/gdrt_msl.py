"""Both: closed-form Group DRO over relevance groups of masked-softmax losses (ours)."""

from gdrt_ds.objectives.base import Objective
from gdrt_ds.objectives.gdrt import closed_form

OBJECTIVE = Objective(
    name="gdrt+msl",
    source="this project",
    formula="GDRT's F with MSL's token losses",
    aggregate=closed_form,
    needs_losses=True,
    masked_softmax=True,
    settings=("dro.tau", "dro.prior", "options.msl_temperature"),
)
