"""SDPA on PyTorch's plain "math" kernel only, e.g. to see whether a fused kernel causes a difference.

As gdrt_ds/models/attention/math_sdpa.py it is chosen by `model.attention=math_sdpa`.
"""

from __future__ import annotations

from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gdrt_ds.models.attention.base import AttentionBackend, needs_sdpa


def math_sdpa(module, query, key, value, attention_mask, **options):
    """What transformers calls: query [B, A, T, D], key and value [B, K, T, D] -> [B, T, A, D]."""
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register("math_sdpa", math_sdpa)
AttentionMaskInterface.register("math_sdpa", sdpa_mask)

BACKEND = AttentionBackend("math_sdpa", obstacle=needs_sdpa, dense_masks=True)
