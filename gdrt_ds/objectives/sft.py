"""Token-mean cross-entropy: the baseline of every peer."""

from gdrt_ds.objectives.base import Objective

OBJECTIVE = Objective(
    name="sft", source="the baseline of every LLM recommender", formula="F = sum_i l_i / n", settings=()
)
