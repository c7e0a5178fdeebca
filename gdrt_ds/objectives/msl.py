"""Masked softmax loss: a softmax with a temperature over the catalogue trie's valid next tokens only."""

from gdrt_ds.objectives.base import Objective

OBJECTIVE = Objective(
    name="msl",
    source="MSL, SIGIR 2025, arXiv 2504.04178",
    formula="F = mean_i -log softmax over valid tokens of logits / temperature",
    masked_softmax=True,
    settings=("options.msl_temperature",),
)
