"""From tokenised samples to the micro-batches of a step.

Which samples (`plan`), as which tensors (`layout`), seen how (`tree_attention`).
"""

from gdrt_ds.batches.layout import MicroBatch, build_micro_batch
from gdrt_ds.batches.plan import BatchPlan

__all__ = ["BatchPlan", "MicroBatch", "build_micro_batch"]
