"""Masked softmax loss: the softmax runs over the catalogue trie's valid next tokens only, with a temperature."""

from gdrt_ds.objectives.base import Objective

OBJECTIVE = Objective(
    name="msl",
    source="MSL, SIGIR 2025, arXiv 2504.04178",
    formula="F = mean_i -log softmax over valid tokens of logits / temperature",
    masked_softmax=True,
)
