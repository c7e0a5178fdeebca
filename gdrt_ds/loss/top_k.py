"""The K-th largest log-probability of each row, found while a chunk of logits exists.

The soft-cap and all factors of the logits are increasing. So the order of the raw products is that of the
final logits, torch.topk reads the chunk once before it is overwritten, and only the K-th value is converted.
Both implementations of the loss use this: the Triton kernels keep no list of the largest logits themselves.

Shapes: C rows of a chunk, V columns (the vocabulary, a block of it, or the allowed tokens of the chunk).
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest(raw_CV: Tensor, k: int, forbidden_CV: Tensor | None = None) -> Tensor:
    """Returns the K-th largest raw logit of complete rows, [C].

    A row with fewer than K tokens to choose from gives its smallest one.

    Args:
        raw_CV: a chunk of products; forbidden places are overwritten with -inf, as the loss does later.
        k: K, at least 1.
        forbidden_CV: True where a row may not choose a token.
    """
    width = raw_CV.shape[1]
    if forbidden_CV is None:
        return torch.topk(raw_CV, min(k, width), dim=1).values[:, -1]
    raw_CV.masked_fill_(forbidden_CV, -torch.inf)
    best_CK = torch.topk(raw_CV, min(k, width), dim=1).values
    allowed_C = width - forbidden_CV.sum(dim=1)
    place_C = allowed_C.clamp(max=best_CK.shape[1]) - 1
    return best_CK.gather(1, place_C.view(-1, 1)).view(-1)


class RunningTopK:
    """The K largest raw logits of rows that are read block by block: [C, K] values are kept, never [C, V]."""

    def __init__(self, k: int):
        self.k = k
        self.best_CK: Tensor | None = None

    def extend(self, raw_CV: Tensor) -> None:
        """Takes a block of columns into account; leaves it unchanged."""
        best_CK = torch.topk(raw_CV, min(self.k, raw_CV.shape[1]), dim=1).values
        if self.best_CK is not None:
            best_CK = torch.cat((self.best_CK, best_CK), dim=1)
            best_CK = torch.topk(best_CK, min(self.k, best_CK.shape[1]), dim=1).values
        self.best_CK = best_CK

    def smallest(self) -> Tensor:
        """[C]: the K-th largest raw logit, or the smallest of a vocabulary below K."""
        return self.best_CK[:, -1]


def log_probability(rowwise, raw_C: Tensor, normaliser_2C: Tensor) -> Tensor:
    """Returns [C] log-probabilities of raw logits.

    Args:
        rowwise: the call's TorchRowwise or TritonRowwise, which knows what makes a raw logit final.
        raw_C: one product with the head per row, in the buffer's dtype.
        normaliser_2C: maximum and log sum exp(z - max) of the final logits of these rows.
    """
    final_C = raw_C.to(rowwise.accumulate) * rowwise.raw_gain
    if rowwise.softcap is not None:
        final_C = rowwise.cap_gain * final_C.tanh()
    return (final_C - normaliser_2C[0]) - normaliser_2C[1]
