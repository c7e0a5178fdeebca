"""The matrix products of the loss with the output head (weight, bias, and an optional low-rank term), a
chunk at a time.

Shapes: C rows of a chunk, H hidden, V columns of a chunk (a slice of the vocabulary or a list of tokens),
r rank of the LoRA pair. logits = gain * (x W^T + bias + scale * (x A^T) B^T). The products run in the
head's own dtype; see `product_dtype`.
"""

from __future__ import annotations

from functools import cache

import torch

Columns = slice | torch.Tensor  # a slice of the vocabulary, or token ids [V] long

# MKL's sgemm with a transposed second operand gains 10-30 % when that operand fits a core's cache: 512 rows
# at H = 576.
CPU_BLOCK_BYTES = 1_200_000  # per thread
# oneDNN's bfloat16 product that sums over 128k or 256k columns gains 5-8 % when it does so 8,192 at a time (N
# 256, H 2,304 and 4,096).
CPU_NARROW_BLOCK = 8192


@cache
def product_dtype(dtype: torch.dtype, device_type: str) -> tuple[torch.dtype, str]:
    """The dtype that a head of `dtype` is multiplied in, and why.

    Float16 and, without AVX512_BF16, bfloat16 are slow on CPUs.
    """
    if device_type != "cpu" or dtype in (torch.float32, torch.float64):
        return dtype, "the head's dtype"
    if dtype == torch.bfloat16 and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return dtype, "this CPU multiplies bfloat16 natively (AVX512_BF16)"
    return (
        torch.float32,
        f"this CPU has no fast {str(dtype).removeprefix('torch.')} product: blocks of the head are converted",
    )


class Head:
    """Products of one call. Nothing outlives it.

    Under ZeRO-3 the gathered weight must be free to go when the forward ends.
    """

    def __init__(self, weight, bias, lora, gain: float, accumulate: torch.dtype):
        self.weight, self.bias, self.gain, self.accumulate = weight, bias, gain, accumulate
        self.lora = lora  # (A[r, H], B[V, r], scale) or None
        self.dtype = product_dtype(weight.dtype, weight.device.type)[0]
        self.converts = self.dtype != weight.dtype
        self.blockwise = (
            weight.device.type == "cpu" and not self.converts and self.dtype.itemsize < 4
        )  # back-projection in blocks
        # One block's product, its float32 copy and the float32 sum.
        self.scratch_per_row = (self.dtype.itemsize + 8) * weight.shape[1] if self.blockwise else 0

    def gathered(self, tokens_V: torch.Tensor) -> Head:
        """The head restricted to some tokens: its rows are copied once and serve both products."""
        lora = (
            None
            if self.lora is None
            else (self.lora[0], self.lora[1].index_select(0, tokens_V), self.lora[2])
        )
        bias = None if self.bias is None else self.bias.index_select(0, tokens_V)
        return Head(self.weight.index_select(0, tokens_V), bias, lora, self.gain, self.accumulate)

    def rows(self, hidden_CH: torch.Tensor) -> Rows:
        return Rows(self, hidden_CH)

    def blocks(self, columns: slice):
        """Slices of `columns` whose head rows fit a CPU's cache; on other devices one slice."""
        step = columns.stop - columns.start
        if self.weight.device.type == "cpu" and (self.converts or self.dtype != torch.bfloat16):
            step = max(
                256, CPU_BLOCK_BYTES * torch.get_num_threads() // (self.weight.shape[1] * 4) // 64 * 64
            )
        for start in range(columns.start, columns.stop, max(step, 1)):
            yield slice(start, min(start + step, columns.stop))

    def block(self, columns: slice) -> torch.Tensor:
        part_VH = self.weight[columns]
        return part_VH.to(self.dtype) if self.converts else part_VH

    def backproject(
        self, gradient_CV: torch.Tensor, columns: slice, into_CH: torch.Tensor, add: bool, slope: float = 1.0
    ) -> None:
        """into (+)= slope * gradient @ W[columns], accumulated in `into`'s dtype across calls."""
        if self.converts or self.blockwise:  # block by block into a float32 sum
            sum_CH = (
                into_CH
                if into_CH.dtype == self.accumulate
                else torch.zeros(into_CH.shape, dtype=self.accumulate)
            )
            if not add:
                sum_CH.zero_()
            for block in self.blocks(columns) if self.converts else ():
                local = slice(block.start - columns.start, block.stop - columns.start)
                sum_CH.addmm_(gradient_CV[:, local], self.block(block), alpha=slope)
            for start in range(0, gradient_CV.shape[1], CPU_NARROW_BLOCK) if self.blockwise else ():
                block_VH = self.weight[columns][start : start + CPU_NARROW_BLOCK]
                sum_CH.add_(gradient_CV[:, start : start + CPU_NARROW_BLOCK] @ block_VH, alpha=slope)
            if sum_CH is not into_CH:
                into_CH.add_(sum_CH) if add else into_CH.copy_(sum_CH)
        elif into_CH.dtype == self.dtype:
            into_CH.addmm_(gradient_CV, self.weight[columns], beta=1.0 if add else 0.0, alpha=slope)
        elif (
            into_CH.device.type == "cuda"
        ):  # float32 out of the product: blocks of the vocabulary add up without rounding to bfloat16
            product_CH = torch.mm(gradient_CV, self.weight[columns], out_dtype=torch.float32)
            into_CH.add_(product_CH, alpha=slope) if add else torch.mul(product_CH, slope, out=into_CH)
        elif add:
            into_CH.add_(gradient_CV @ self.weight[columns], alpha=slope)
        else:
            torch.mul(gradient_CV @ self.weight[columns], slope, out=into_CH)


class Rows:
    """A chunk of hidden rows, prepared for products with the head.

    Converted, and already multiplied by the gain.
    """

    def __init__(self, head: Head, hidden_CH: torch.Tensor):
        self.head = head
        self.fold = head.gain != 1.0
        x_CH = hidden_CH.to(head.dtype)
        self.x_CH = x_CH * head.gain if self.fold else x_CH
        self.low_rank_Cr = None
        if head.lora is not None:
            a_rH, _, scale = head.lora
            self.low_rank_Cr = (hidden_CH.to(head.accumulate) @ a_rH.to(head.accumulate).T) * scale

    def logits(self, columns: slice, out_CV: torch.Tensor) -> None:
        """Fills `out`, which has the dtype of the products."""
        head, gain = self.head, self.head.gain
        for block in head.blocks(columns):
            local_CV = out_CV[:, block.start - columns.start : block.stop - columns.start]
            if head.bias is None:
                torch.mm(self.x_CH, head.block(block).T, out=local_CV)
            else:  # inside the product: one rounding for a narrow dtype
                bias_V = head.bias[block].to(head.dtype)
                torch.addmm(
                    bias_V * gain if self.fold else bias_V, self.x_CH, head.block(block).T, out=local_CV
                )
        if head.lora is not None:
            low_rank_Cr, b_Vr = self.low_rank_Cr.to(head.dtype), head.lora[1][columns].to(head.dtype)
            out_CV.addmm_(low_rank_Cr, b_Vr.T, alpha=gain if self.fold else 1.0)
