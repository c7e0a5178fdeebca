"""Information-gain weights: tokens that the trie already determines weigh beta, the others 1."""

import numpy as np

from gdrt_ds.objectives.base import Objective, TokenTable


def information_gain_weights(table: TokenTable) -> np.ndarray:
    return np.where(table.branching, 1.0, table.options.igd_beta)


OBJECTIVE = Objective(
    name="igd",
    source=(
        "IGD, Token Decisiveness Modeling via Information Gain in LLMs for Personalized Recommendation, "
        "arXiv 2506.13229"
    ),
    formula="F = sum_i w_i l_i / sum_i w_i, w_i = beta where only one next token is valid",
    token_weights=information_gain_weights,
    needs_catalogue=True,
    settings=("options.igd_beta",),
)
