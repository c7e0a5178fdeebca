"""The fused group loss: hidden states of supervised tokens in, one loss sum per group out, no [N, V] logits.

    from gdrt_ds.loss import group_cross_entropy
    out = group_cross_entropy(hidden, head.weight, labels, groups, num_groups=8)
    (weights * out.loss_sums).sum().backward()          # weights may be known only after an all-reduce

Files:
    group_loss.py         the public op and its autograd function
    head.py               the matrix products with the head
    rowwise.py            the part between the products, in torch
    kernels.py            the same part in Triton
    head_gradients.py     gradients of a head that is trained
    allowed.py            softmax over the next tokens that a catalogue trie has
    top_k.py              the K-th largest log-probability of each row
    checks.py             what is refused
    implementations.py    torch or Triton, and why
    reference.py          plain torch, the judge of all others
"""

from gdrt_ds.loss.allowed import AllowedTokens
from gdrt_ds.loss.group_loss import GroupLoss, group_cross_entropy
from gdrt_ds.loss.implementations import describe
from gdrt_ds.loss.reference import reference_group_cross_entropy, reference_top_k_log_probs
from gdrt_ds.loss.rowwise import group_sums

__all__ = [
    "AllowedTokens",
    "GroupLoss",
    "describe",
    "group_cross_entropy",
    "group_sums",
    "reference_group_cross_entropy",
    "reference_top_k_log_probs",
]
