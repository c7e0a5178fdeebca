"""PyTorch's scaled_dot_product_attention: runs on every device and in every dtype."""

from gdrt_ds.models.attention.base import AttentionBackend, needs_sdpa

BACKEND = AttentionBackend("sdpa", obstacle=needs_sdpa, packs=True, dense_masks=True)
