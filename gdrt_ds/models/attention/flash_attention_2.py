"""FlashAttention-2, from the package flash-attn: GPUs, 16-bit dtypes."""

from __future__ import annotations

from gdrt_ds.models.attention.base import AttentionBackend, Obstacle, Place, needs_flash_kernel

PACKAGE = "flash_attn"


def obstacle(place: Place) -> Obstacle | None:
    """A GPU, a 16-bit dtype and the package are needed."""
    return needs_flash_kernel(place, PACKAGE)


BACKEND = AttentionBackend("flash_attention_2", obstacle=obstacle, chosen_because=f"{PACKAGE} is importable")
