"""FlashAttention-2, from the package flash-attn: GPUs, 16-bit dtypes.

Rows of `train.packing=packed` go through its variable-length call (gdrt_ds/batches/varlen_rows.py).
"""

from __future__ import annotations

from gdrt_ds.batches.varlen_rows import FLASH_2
from gdrt_ds.models.attention.base import AttentionBackend, Obstacle, Place, needs_flash_kernel

PACKAGE = "flash_attn"


def obstacle(place: Place) -> Obstacle | None:
    """A GPU, a 16-bit dtype and the package are needed."""
    return needs_flash_kernel(place, PACKAGE)


BACKEND = AttentionBackend(
    "flash_attention_2",
    obstacle=obstacle,
    packings=("packed",),
    packed_by=FLASH_2,
    chosen_because=f"{PACKAGE} is importable",
)
