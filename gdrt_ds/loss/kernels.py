"""Triton kernels for what happens to a chunk of logits between the two matrix products.

rowwise.py is the same in torch. Logits lie in device memory in the head's dtype, as a model's own logits do;
arithmetic is float32.

Memory traffic: a chunk of complete rows is read twice and written once. An online log-sum-exp comes first,
then softmax - onehot is written over the logits themselves, so no second buffer exists. With 1,000 rows of a
128k vocabulary in bfloat16 that is 0.8 GB of traffic beside 2 x 0.9 TFLOP of products (H = 3584), which is
below a tenth of their time.

There are no atomics: one program owns a row, one program owns a group, and their loops run in order. So sums
are bitwise reproducible.

The kernels run on CPUs under TRITON_INTERPRET=1 (set before import) and compile ahead of time for sm_80 and
sm_90. tests/loss/test_kernels.py does both and lists registers and spills.

Shapes: C rows of a chunk, V columns, N tokens, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gdrt_ds.loss.rowwise import TorchRowwise

INTERPRETED = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False
# 16 values per thread at 8 warps: enough loads in flight to fill the memory bus, and no spills (see the test)
COLUMN_BLOCK = 4096
NUM_WARPS = 8
TOKEN_BLOCK = 1024


def why_unusable(device_type: str, dtype: torch.dtype) -> str:
    """Returns why the kernels cannot run on such tensors; empty when they can."""
    if dtype == torch.float64:
        return "the kernels compute in float32 and the head is float64"
    if device_type == "cpu" and not INTERPRETED:
        return "Triton runs on CPU tensors only when TRITON_INTERPRET=1 is set before it is imported"
    return ""


@triton.jit
def _final_logits(raw, gain, cap_gain, HAS_CAP: tl.constexpr, KEEP_INF: tl.constexpr):
    """Returns raw * gain, or cap_gain * tanh(raw * gain) with the soft-cap, and tanh's derivative."""
    scaled = raw * gain
    slope = scaled * 0.0 + 1.0
    if HAS_CAP:
        # tanh from exp of a negative number: no overflow, and no device library is needed.
        decay = tl.exp(-2.0 * tl.abs(scaled))
        size = (1.0 - decay) / (1.0 + decay)
        bounded = tl.where(scaled < 0, -size, size)
        slope = 1.0 - bounded * bounded
        final = cap_gain * bounded
        if KEEP_INF:  # a forbidden token is -inf and must stay so, although tanh would bring it back
            final = tl.where(raw == float("-inf"), float("-inf"), final)
    else:
        final = scaled
    return final, slope


@triton.jit
def finish_rows_kernel(
    logits_ptr,
    columns_ptr,
    losses_ptr,
    highest_ptr,
    log_total_ptr,
    row_stride,
    num_columns,
    gain,
    cap_gain,
    slope,
    HAS_CAP: tl.constexpr,
    KEEP_INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Complete rows, one program each: the loss, and slope * (softmax - onehot) * tanh' over the logits."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * row_stride
    column = tl.load(columns_ptr + row)
    lanes = tl.arange(0, BLOCK)
    highest = float("-inf")
    total = 0.0
    for start in range(0, num_columns, BLOCK):
        index = start + lanes
        inside = index < num_columns
        raw = tl.load(base + index, mask=inside, other=0.0).to(tl.float32)
        final, _ = _final_logits(raw, gain, cap_gain, HAS_CAP, KEEP_INF)
        final = tl.where(inside, final, float("-inf"))
        highest_new = tl.maximum(highest, tl.max(final, axis=0))
        safe = tl.where(highest_new == float("-inf"), 0.0, highest_new)
        total = total * tl.exp(highest - safe) + tl.sum(tl.exp(final - safe), axis=0)
        highest = highest_new
    target, _ = _final_logits(tl.load(base + column).to(tl.float32), gain, cap_gain, HAS_CAP, KEEP_INF)
    tl.store(losses_ptr + row, (highest - target) + tl.log(total))
    tl.store(highest_ptr + row, highest)
    tl.store(log_total_ptr + row, tl.log(total))
    # Every thread must have read the target before any thread overwrites it.
    tl.debug_barrier()
    inverse = 1.0 / total
    for start in range(0, num_columns, BLOCK):
        index = start + lanes
        inside = index < num_columns
        raw = tl.load(base + index, mask=inside, other=0.0).to(tl.float32)
        final, tanh_slope = _final_logits(raw, gain, cap_gain, HAS_CAP, KEEP_INF)
        gradient = tl.exp(final - highest) * inverse - tl.where(index == column, 1.0, 0.0)
        if HAS_CAP:
            gradient = gradient * tanh_slope
        tl.store(base + index, (gradient * slope).to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def extend_rows_kernel(
    logits_ptr,
    labels_ptr,
    highest_ptr,
    total_ptr,
    target_ptr,
    row_stride,
    first,
    num_columns,
    gain,
    cap_gain,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of the vocabulary from column `first`.

    Updates the running maximum, sum of exponentials and target of each row.
    """
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * row_stride
    lanes = tl.arange(0, BLOCK)
    highest = tl.load(highest_ptr + row)
    total = tl.load(total_ptr + row)
    for start in range(0, num_columns, BLOCK):
        index = start + lanes
        inside = index < num_columns
        raw = tl.load(base + index, mask=inside, other=0.0).to(tl.float32)
        final, _ = _final_logits(raw, gain, cap_gain, HAS_CAP, False)
        final = tl.where(inside, final, float("-inf"))
        highest_new = tl.maximum(highest, tl.max(final, axis=0))
        safe = tl.where(highest_new == float("-inf"), 0.0, highest_new)
        total = total * tl.exp(highest - safe) + tl.sum(tl.exp(final - safe), axis=0)
        highest = highest_new
    tl.store(highest_ptr + row, highest)
    tl.store(total_ptr + row, total)
    column = tl.load(labels_ptr + row) - first
    if (column >= 0) & (column < num_columns):
        target, _ = _final_logits(tl.load(base + column).to(tl.float32), gain, cap_gain, HAS_CAP, False)
        tl.store(target_ptr + row, target)


@triton.jit
def gradient_kernel(
    logits_ptr,
    labels_ptr,
    highest_ptr,
    log_total_ptr,
    coefficient_ptr,
    row_stride,
    first,
    num_columns,
    gain,
    cap_gain,
    HAS_CAP: tl.constexpr,
    KEEP_INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of the vocabulary, elementwise: logits <- coefficient * (softmax - onehot) * tanh'."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * row_stride
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_columns
    highest, log_total = tl.load(highest_ptr + row), tl.load(log_total_ptr + row)
    column = tl.load(labels_ptr + row) - first
    raw = tl.load(base + index, mask=inside, other=0.0).to(tl.float32)
    final, tanh_slope = _final_logits(raw, gain, cap_gain, HAS_CAP, KEEP_INF)
    gradient = tl.exp((final - highest) - log_total) - tl.where(index == column, 1.0, 0.0)
    if HAS_CAP:
        gradient = gradient * tanh_slope
    gradient = gradient * tl.load(coefficient_ptr + row)
    tl.store(base + index, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def group_sums_kernel(losses_ptr, groups_ptr, sums_ptr, num_tokens, BLOCK: tl.constexpr):
    """One program per group walks the tokens in order: float32 inside a block, float64 across blocks."""
    group = tl.program_id(0)
    total = tl.zeros([1], dtype=tl.float64)
    for start in range(0, num_tokens, BLOCK):
        index = start + tl.arange(0, BLOCK)
        member = tl.load(groups_ptr + index, mask=index < num_tokens, other=-1) == group
        losses = tl.load(losses_ptr + index, mask=member, other=0.0)
        total += tl.sum(losses, axis=0).to(tl.float64)
    tl.store(sums_ptr + group + tl.arange(0, 1), total)


class TritonRowwise(TorchRowwise):
    """The Triton part of one call, with the interface of TorchRowwise.

    The buffer holds logits in the product's dtype, and the kernels apply gain and soft-cap.
    """

    def __init__(self, settings, product_dtype: torch.dtype):
        super().__init__(settings, product_dtype)
        self.gain = self.head_gain * self.scratch_gain
        self.raw_gain = self.gain
        if self.softcap is None:
            self.cap_gain = 0.0  # the kernel takes a number and does not read it
        self.slope = settings.slope
        self.head_gain = 1.0
        self.gradient_slope = 1.0
        self.bytes_per_logit = product_dtype.itemsize
        self.chunk_bytes = settings.chunk_bytes

    def buffer(self, rows: int, columns: int, device) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=self.buffer_dtype, device=device)

    def _options(self, columns: int) -> dict:
        return {
            "HAS_CAP": self.softcap is not None,
            "BLOCK": min(COLUMN_BLOCK, triton.next_power_of_2(columns)),
            "num_warps": NUM_WARPS,
        }

    def finish_rows_(self, buffer_CV, columns_C, forbidden_CV):
        rows, columns = buffer_CV.shape
        if forbidden_CV is not None:
            buffer_CV.masked_fill_(forbidden_CV, -torch.inf)
        losses_C, highest_C, log_total_C = torch.empty(3, rows, dtype=torch.float32, device=buffer_CV.device)
        finish_rows_kernel[(rows,)](
            buffer_CV,
            columns_C,
            losses_C,
            highest_C,
            log_total_C,
            buffer_CV.stride(0),
            columns,
            self.gain,
            self.cap_gain,
            self.slope,
            KEEP_INF=forbidden_CV is not None,
            **self._options(columns),
        )
        return losses_C, torch.stack((highest_C, log_total_C))

    def extend_rows_(self, buffer_CV, labels_C, first: int, state) -> None:
        highest_C, total_C, target_C = state
        rows, columns = buffer_CV.shape
        extend_rows_kernel[(rows,)](
            buffer_CV,
            labels_C,
            highest_C,
            total_C,
            target_C,
            buffer_CV.stride(0),
            first,
            columns,
            self.gain,
            self.cap_gain,
            **self._options(columns),
        )

    def gradient_(self, buffer_CV, columns_C, first: int, normaliser_2C, coefficient_C, forbidden_CV) -> None:
        rows, columns = buffer_CV.shape
        if forbidden_CV is not None:
            buffer_CV.masked_fill_(forbidden_CV, -torch.inf)
        options = self._options(columns)
        highest_C, log_total_C = normaliser_2C.contiguous()
        gradient_kernel[(rows, triton.cdiv(columns, options["BLOCK"]))](
            buffer_CV,
            columns_C,
            highest_C,
            log_total_C,
            coefficient_C,
            buffer_CV.stride(0),
            first,
            columns,
            self.gain,
            self.cap_gain,
            KEEP_INF=forbidden_CV is not None,
            **options,
        )

    @staticmethod
    def group_sums(losses_N, groups_N, num_groups: int) -> torch.Tensor:
        sums_G = torch.zeros(num_groups, dtype=torch.float64, device=losses_N.device)
        group_sums_kernel[(num_groups,)](losses_N, groups_N, sums_G, len(losses_N), BLOCK=TOKEN_BLOCK)
        return sums_G
