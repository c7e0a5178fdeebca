"""FlashAttention-3, from the package flash_attn_interface: Hopper GPUs (H100, H200), 16-bit dtypes.

Rows of `train.packing=packed` go through its variable-length call (gdrt_ds/batches/varlen_rows.py).
"""

from __future__ import annotations

import torch

from gdrt_ds.batches.varlen_rows import FLASH_3
from gdrt_ds.models.attention.base import AttentionBackend, Obstacle, Place, needs_flash_kernel

PACKAGE = "flash_attn_interface"
HOPPER = 9  # major number of the compute capability


def obstacle(place: Place) -> Obstacle | None:
    """A GPU, a 16-bit dtype and the package are needed; `auto` takes it on Hopper only."""
    found = needs_flash_kernel(place, PACKAGE)
    if found is not None:
        return found
    # A plan is also made on machines without the GPU of the job.
    if not torch.cuda.is_available():
        return Obstacle("whether the GPU is a Hopper one is not known here", only_auto=True)
    if torch.cuda.get_device_capability(place.device)[0] != HOPPER:
        return Obstacle("FlashAttention-3 is made for Hopper GPUs", only_auto=True)
    return None


BACKEND = AttentionBackend(
    "flash_attention_3",
    obstacle=obstacle,
    packings=("packed",),
    packed_by=FLASH_3,
    chosen_because=f"{PACKAGE} is importable",
)
