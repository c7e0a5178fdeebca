"""The matrix products of the loss with the output head, a chunk at a time.

The head is a weight, a bias and an optional low-rank term:

    logits = gain * (x W^T + bias + scale * (x A^T) B^T)

The products run in the head's own dtype where the device has them; see `product_dtype`.

Shapes: C rows of a chunk, H hidden, V columns of a chunk (a slice of the vocabulary or a list of tokens),
r rank of the LoRA pair.
"""

from __future__ import annotations

from functools import cache

import torch

from gdrt_ds.runtime.cpu_products import bfloat16_products

CPU_BLOCK_BYTES = 1_200_000
"""Bytes of the head per thread and product. MKL's sgemm with a transposed second operand gains 10-30 % when
that operand fits a core's cache: 512 rows at H = 576."""

CPU_NARROW_BLOCK = 8192
"""Columns per product. oneDNN's bfloat16 product that sums over 128k or 256k columns gains 5-8 % when it does
so 8,192 at a time (N 256, H 2,304 and 4,096)."""


@cache
def product_dtype(dtype: torch.dtype, device_type: str) -> tuple[torch.dtype, str]:
    """Returns the dtype that a head of `dtype` is multiplied in, and why.

    On CPUs float16 is slow, and on many so is bfloat16 (gdrt_ds/runtime/cpu_products.py measures it); such
    heads are multiplied in float32.
    """
    if device_type != "cpu" or dtype in (torch.float32, torch.float64):
        return dtype, "the head's dtype"
    reason = "this CPU has no fast float16 product"
    if dtype == torch.bfloat16:
        faster, reason = bfloat16_products()
        if faster:
            return dtype, reason
    return torch.float32, f"{reason}: blocks of the head are converted"


class Head:
    """The products of one call of the loss.

    Nothing outlives the call: under ZeRO-3 the gathered weight must be free to go when the forward ends.

    Args:
        weight: [V, H].
        bias: [V] or None.
        lora: (A[r, H], B[V, r], scale) or None.
        gain: factor of the logits.
        accumulate: dtype of sums over several products.
    """

    def __init__(self, weight, bias, lora, gain: float, accumulate: torch.dtype):
        self.weight = weight
        self.bias = bias
        self.lora = lora
        self.gain = gain
        self.accumulate = accumulate
        self.dtype, _ = product_dtype(weight.dtype, weight.device.type)
        self.converts = self.dtype != weight.dtype
        # On CPUs a narrow head is multiplied back in blocks of columns, see CPU_NARROW_BLOCK.
        self.blockwise = weight.device.type == "cpu" and not self.converts and self.dtype.itemsize < 4
        self.scratch_per_row = 0
        if self.blockwise:
            # One block's product, its float32 copy and the float32 sum.
            self.scratch_per_row = (self.dtype.itemsize + 8) * weight.shape[1]
        if self.converts:
            # The row itself and the sum, both in the dtype of the products.
            self.scratch_per_row = 2 * self.dtype.itemsize * weight.shape[1]

    def gathered(self, tokens_V: torch.Tensor) -> Head:
        """Returns the head restricted to some tokens: its rows are copied once and serve both products."""
        lora = self.lora
        if lora is not None:
            a_rH, b_Vr, scale = lora
            lora = (a_rH, b_Vr.index_select(0, tokens_V), scale)
        bias = self.bias
        if bias is not None:
            bias = bias.index_select(0, tokens_V)
        return Head(self.weight.index_select(0, tokens_V), bias, lora, self.gain, self.accumulate)

    def rows(self, hidden_CH: torch.Tensor) -> Rows:
        """Prepares a chunk of hidden rows for products with the head."""
        return Rows(self, hidden_CH)

    def blocks(self, columns: slice):
        """Slices of `columns` whose head rows fit a CPU's cache; on other devices one slice."""
        step = columns.stop - columns.start
        if self.weight.device.type == "cpu" and (self.converts or self.dtype != torch.bfloat16):
            fitting = CPU_BLOCK_BYTES * torch.get_num_threads() // (self.weight.shape[1] * 4)
            step = max(256, fitting // 64 * 64)
        for start in range(columns.start, columns.stop, max(step, 1)):
            yield slice(start, min(start + step, columns.stop))

    def block(self, columns: slice) -> torch.Tensor:
        """Rows of the weight, [V, H], in the dtype of the products."""
        part_VH = self.weight[columns]
        if self.converts:
            return part_VH.to(self.dtype)
        return part_VH

    def backproject(
        self, gradient_CV: torch.Tensor, columns: slice, into_CH: torch.Tensor, add: bool, slope: float = 1.0
    ) -> None:
        """Computes into (+)= slope * gradient @ W[columns].

        Args:
            gradient_CV: gradient of the logits.
            columns: rows of the weight that belong to these logits.
            into_CH: the result; calls add up in its dtype.
            add: adds to `into_CH` instead of overwriting it.
            slope: a factor.
        """
        if self.converts or self.blockwise:
            self._backproject_in_blocks(gradient_CV, columns, into_CH, add, slope)
        elif into_CH.dtype == self.dtype:
            into_CH.addmm_(gradient_CV, self.weight[columns], beta=1.0 if add else 0.0, alpha=slope)
        elif into_CH.device.type == "cuda":
            # float32 out of the product: blocks of the vocabulary add up without rounding to bfloat16.
            product_CH = torch.mm(gradient_CV, self.weight[columns], out_dtype=torch.float32)
            if add:
                into_CH.add_(product_CH, alpha=slope)
            else:
                torch.mul(product_CH, slope, out=into_CH)
        elif add:
            into_CH.add_(gradient_CV @ self.weight[columns], alpha=slope)
        else:
            torch.mul(gradient_CV @ self.weight[columns], slope, out=into_CH)

    def _backproject_in_blocks(
        self, gradient_CV: torch.Tensor, columns: slice, into_CH: torch.Tensor, add: bool, slope: float
    ) -> None:
        """The same on CPUs, block by block into a float32 sum."""
        sum_CH = into_CH
        if into_CH.dtype != self.accumulate:
            sum_CH = torch.zeros(into_CH.shape, dtype=self.accumulate)
        elif not add:
            sum_CH.zero_()
        if self.converts:
            for block in self.blocks(columns):
                local = slice(block.start - columns.start, block.stop - columns.start)
                sum_CH.addmm_(gradient_CV[:, local], self.block(block), alpha=slope)
        else:
            for start in range(0, gradient_CV.shape[1], CPU_NARROW_BLOCK):
                block_VH = self.weight[columns][start : start + CPU_NARROW_BLOCK]
                sum_CH.add_(gradient_CV[:, start : start + CPU_NARROW_BLOCK] @ block_VH, alpha=slope)
        if sum_CH is into_CH:
            return
        if add:
            into_CH.add_(sum_CH)
        else:
            into_CH.copy_(sum_CH)


class Rows:
    """A chunk of hidden rows in the dtype of the products, already multiplied by the gain."""

    def __init__(self, head: Head, hidden_CH: torch.Tensor):
        self.head = head
        self.fold = head.gain != 1.0
        x_CH = hidden_CH.to(head.dtype)
        if self.fold:
            x_CH = x_CH * head.gain
        self.x_CH = x_CH
        self.low_rank_Cr = None
        if head.lora is not None:
            a_rH, _, scale = head.lora
            self.low_rank_Cr = (hidden_CH.to(head.accumulate) @ a_rH.to(head.accumulate).T) * scale

    def logits(self, columns: slice, out_CV: torch.Tensor) -> None:
        """Fills `out_CV`, which has the dtype of the products, with the logits of these columns."""
        head = self.head
        for block in head.blocks(columns):
            local_CV = out_CV[:, block.start - columns.start : block.stop - columns.start]
            if head.bias is None:
                torch.mm(self.x_CH, head.block(block).T, out=local_CV)
            else:
                bias_V = head.bias[block].to(head.dtype)
                if self.fold:
                    bias_V = bias_V * head.gain
                # The bias is added inside the product: one rounding for a narrow dtype.
                torch.addmm(bias_V, self.x_CH, head.block(block).T, out=local_CV)
        if head.lora is not None:
            low_rank_Cr = self.low_rank_Cr.to(head.dtype)
            b_Vr = head.lora[1][columns].to(head.dtype)
            out_CV.addmm_(low_rank_Cr, b_Vr.T, alpha=head.gain)
