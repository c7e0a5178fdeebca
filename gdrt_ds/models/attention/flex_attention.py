"""PyTorch's FlexAttention."""

from gdrt_ds.models.attention.base import AttentionBackend, needs_sdpa

BACKEND = AttentionBackend("flex_attention", obstacle=needs_sdpa)
