"""PyTorch's scaled_dot_product_attention: runs on every device and in every dtype."""

from gdrt_ds.models.attention.base import PACKINGS, AttentionBackend, needs_sdpa

BACKEND = AttentionBackend("sdpa", obstacle=needs_sdpa, packings=PACKINGS, dense_masks=True)
