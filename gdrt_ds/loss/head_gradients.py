"""The gradients of a trained head: dH, dW, d bias and those of a LoRA pair, from blocks of logit gradients.

Shapes: N supervised tokens, H hidden, V vocabulary, r rank of a LoRA pair; C, V for the rows and columns of
one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdrt_ds.loss.head import Head


class HeadGradients:
    """Accumulates what a recomputed backward makes, one block of the vocabulary at a time.

    Sums are kept in float32 (float64 for a float64 head). A block of dW that only one product makes is
    written in the head's own dtype at once.

    Args:
        head: the head of the forward.
        hidden_NH: hidden states.
        wants: whether a gradient is asked for, of hidden, weight, bias, A and B.
        accumulate: dtype of the sums.
        once: every row of dW is made by one product, so that no sum is needed.
    """

    def __init__(
        self, head: Head, hidden_NH: Tensor, wants: tuple[bool, ...], accumulate: torch.dtype, once: bool
    ):
        self.head = head
        self.hidden_NH = hidden_NH
        self.accumulate = accumulate
        hidden, weight, bias, a_rH, b_Vr = wants[:5]
        self.d_hidden = self._zeros(hidden_NH, hidden)
        self.weight_once = weight and once
        if self.weight_once:
            self.d_weight = torch.empty_like(head.weight)
        else:
            self.d_weight = self._zeros(head.weight, weight)
        self.d_bias = self._zeros(head.bias, bias)
        self.has_lora = head.lora is not None
        self.wants_a = a_rH
        # The gradient of the low-rank activations, from which dA and LoRA's part of dH are made at the end.
        self.low_Nr: Tensor | None = None
        self.d_b: Tensor | None = None
        if self.has_lora:
            rank = head.lora[0].shape[0]
            if hidden or a_rH:
                self.low_Nr = torch.zeros(len(hidden_NH), rank, dtype=accumulate, device=hidden_NH.device)
            self.d_b = self._zeros(head.lora[1], b_Vr)

    def _zeros(self, like: Tensor | None, wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        return torch.zeros(like.shape, dtype=self.accumulate, device=like.device)

    def add(self, part: Head, gradient_CV: Tensor, rows, part_columns: slice, target) -> None:
        """Adds one block.

        Args:
            part: the head, or the rows of it that were gathered.
            gradient_CV: gradient of the block's logits.
            rows: the block's tokens, a slice or indices.
            part_columns: the block's columns in `part`.
            target: the same columns as rows of the whole head, a slice or distinct token ids.
        """
        self._add_hidden(part, gradient_CV, rows, part_columns)
        x_CH = self.hidden_NH[rows]
        if self.weight_once:
            if part.converts:
                self.d_weight[target] = gradient_CV.T @ x_CH.to(part.dtype)
            else:
                torch.mm(gradient_CV.T, x_CH, out=self.d_weight[target])
        elif self.d_weight is not None:
            _into(self.d_weight, target, gradient_CV.T @ x_CH.to(part.dtype))
        if self.d_bias is not None:
            _into(self.d_bias, target, gradient_CV.sum(0, dtype=self.accumulate))
        if self.has_lora:
            self._add_lora(part, gradient_CV, rows, part_columns, target)

    def _add_hidden(self, part: Head, gradient_CV: Tensor, rows, part_columns: slice) -> None:
        if self.d_hidden is None:
            return
        if isinstance(rows, slice):
            part.backproject(gradient_CV, part_columns, self.d_hidden[rows], add=True)
            return
        # Indexing with indices copies, so the product cannot be added in place.
        d_CH = torch.empty(self.hidden_NH[rows].shape, dtype=self.accumulate, device=self.hidden_NH.device)
        part.backproject(gradient_CV, part_columns, d_CH, add=False)
        self.d_hidden[rows] = d_CH

    def _add_lora(self, part: Head, gradient_CV: Tensor, rows, part_columns: slice, target) -> None:
        a_rH, b_Vr, scale = part.lora
        if self.low_Nr is not None:
            low_Cr = gradient_CV @ b_Vr[part_columns].to(part.dtype)
            self.low_Nr[rows] += low_Cr.to(self.accumulate) * scale
        if self.d_b is not None:
            low_rank_Cr = (self.hidden_NH[rows].to(self.accumulate) @ a_rH.to(self.accumulate).T) * scale
            _into(self.d_b, target, gradient_CV.T @ low_rank_Cr.to(part.dtype))

    def finish(self) -> tuple[Tensor | None, ...]:
        """Returns the gradients of hidden, weight, bias, A and B in their dtypes; None = not wanted."""
        d_a = None
        d_b = None
        if self.has_lora:
            a_rH, b_Vr, _ = self.head.lora
            if self.d_hidden is not None:
                self.d_hidden.addmm_(self.low_Nr, a_rH.to(self.accumulate))
            if self.wants_a:
                d_a = (self.low_Nr.T @ self.hidden_NH.to(self.accumulate)).to(a_rH.dtype)
            d_b = _in_dtype_of(b_Vr, self.d_b)
        return (
            _in_dtype_of(self.hidden_NH, self.d_hidden),
            _in_dtype_of(self.head.weight, self.d_weight),
            _in_dtype_of(self.head.bias, self.d_bias),
            d_a,
            d_b,
        )


def _into(whole: Tensor, target, value: Tensor) -> None:
    if isinstance(target, slice):
        whole[target] += value
    else:
        # Token ids are distinct within a block: no collision, and a fixed order.
        whole.index_add_(0, target, value.to(whole.dtype))


def _in_dtype_of(tensor: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return gradient.to(tensor.dtype)
