"""Inverse-popularity weights of examples.

It is debiasing at the level of the data set, the lever that is said to miss pretraining bias.
"""

import numpy as np

from gdrt_ds.objectives.base import Objective, TokenTable


def inverse_popularity(table: TokenTable) -> np.ndarray:
    weights = np.maximum(table.train_count, 1).astype(np.float64) ** -table.options.reweight_power
    return weights / np.average(weights, weights=table.counts)


OBJECTIVE = Objective(
    name="reweight",
    source="inverse-propensity weighting, e.g. Schnabel et al., ICML 2016",
    formula="F = sum_i w_i l_i / sum_i w_i, w = train_count(target)^-power",
    token_weights=inverse_popularity,
    settings=("options.reweight_power",),
)
