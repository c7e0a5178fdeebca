"""What happens to a chunk of logits between the two matrix products, in torch, in place. kernels.py does
the same in Triton.

Shapes: C rows of the chunk, V columns (the vocabulary, a block of it, or the allowed tokens of the chunk).
Each function gets float32 (or float64) logits that are already multiplied by logit_scale / temperature;
with a soft-cap c they are multiplied by logit_scale / c instead, so that tanh comes first and c /
temperature afterwards.

Memory traffic is the cost: a chunk of [C, V] is read and written as few times as torch's operators allow,
and never copied.
"""

from __future__ import annotations

import torch

SCRATCH_BYTES = (
    4 * 2**20
)  # float32 rows being finished for a 2-byte head: within a CPU's second- and third-level caches


def soft_cap_(logits_CV: torch.Tensor, gain: float, keep_CV: torch.Tensor | None) -> None:
    """logits <- gain * tanh(logits); `keep_CV` receives 1 - tanh^2, the factor of the backward."""
    logits_CV.tanh_()
    if keep_CV is not None:
        torch.mul(logits_CV, logits_CV, out=keep_CV)
        keep_CV.neg_().add_(1.0)
    logits_CV.mul_(gain)


def finish_rows_(logits_CV: torch.Tensor, columns_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Complete rows: returns (losses[C], normaliser[2, C]) and leaves softmax - onehot, the gradient of
    each loss, in the buffer.

    The normaliser is the maximum and log sum exp(z - max), kept apart: their sum would round away the
    second for large logits.
    The largest probability is 1 / sum exp(z - max) and lies in [1/V, 1], so its logarithm is exact for
    logits of any size, and torch's fused softmax needs one trip through memory.
    """
    columns_C1 = columns_C.view(-1, 1)
    target_C = logits_CV.gather(1, columns_C1).view(-1)
    highest_C = logits_CV.amax(dim=1)
    torch.softmax(logits_CV, dim=1, out=logits_CV)
    log_total_C = logits_CV.amax(dim=1).log_().neg_()
    _subtract_at_label_(logits_CV, columns_C1, None)
    return (highest_C - target_C).add_(log_total_C), torch.stack((highest_C, log_total_C))


def extend_log_sum_exp_(logits_CV: torch.Tensor, highest_C: torch.Tensor, total_C: torch.Tensor) -> None:
    """A block of columns: updates the running maximum and sum of exponentials in place.

    The logits are overwritten.
    """
    highest_new_C = torch.maximum(highest_C, logits_CV.amax(dim=1))
    # A row may have seen only -inf so far (a head bias of -inf): exp(-inf - -inf) would be NaN.
    safe_C = torch.where(highest_new_C == -torch.inf, torch.zeros_like(highest_new_C), highest_new_C)
    total_C.mul_((highest_C - safe_C).exp_())
    total_C.add_(logits_CV.sub_(safe_C.view(-1, 1)).exp_().sum(dim=1))
    highest_C.copy_(highest_new_C)


def gradient_(
    logits_CV: torch.Tensor,
    columns_C: torch.Tensor,
    inside_C: torch.Tensor,
    normaliser_2C: torch.Tensor,
    coefficient_C: torch.Tensor,
) -> None:
    """A block of columns: logits <- coefficient * (softmax - onehot), from the normaliser of the forward.

    `inside_C` marks rows whose label lies in this block; `columns_C` is valid where it is true, and 0
    elsewhere.
    """
    logits_CV.sub_(normaliser_2C[0].view(-1, 1)).sub_(normaliser_2C[1].view(-1, 1)).exp_()
    _subtract_at_label_(logits_CV, columns_C.view(-1, 1), inside_C)
    logits_CV.mul_(coefficient_C.view(-1, 1))


def _subtract_at_label_(
    buffer_CV: torch.Tensor, columns_C1: torch.Tensor, inside_C: torch.Tensor | None
) -> None:
    # One index per row: scatter_add_ meets no collision and is deterministic on every device.
    ones = torch.full(columns_C1.shape, -1.0, dtype=buffer_CV.dtype, device=buffer_CV.device)
    if inside_C is not None:
        ones.mul_(inside_C.view(-1, 1))
    buffer_CV.scatter_add_(1, columns_C1, ones)


def group_sums(losses_N: torch.Tensor, groups_N: torch.Tensor, num_groups: int) -> torch.Tensor:
    """float64 loss sums [G] in a fixed order: torch's 1-D index_add_ is sequential on the CPU.

    CUDA's uses atomics, hence the product.
    """
    if losses_N.device.type == "cpu":
        return torch.zeros(num_groups, dtype=torch.float64).index_add_(0, groups_N, losses_N.double())
    member_NG = groups_N.view(-1, 1) == torch.arange(num_groups, device=losses_N.device)
    return torch.where(member_NG, losses_N.double().view(-1, 1), 0.0).sum(dim=0)


class TorchRowwise:
    """The torch part of one call: buffers, chunk sizes and the functions above with the call's settings.

    A bfloat16 or float16 head leaves its logits in a buffer of its own dtype, as a model would. Arithmetic
    is float32: a few rows at a time are widened into a scratch that stays in the CPU's cache, finished
    there, and written back.
    """

    def __init__(self, settings, product_dtype: torch.dtype):
        self.accumulate = torch.float64 if product_dtype == torch.float64 else torch.float32
        self.narrow, self.buffer_dtype = product_dtype.itemsize < 4, product_dtype
        self.softcap, self.gradient_slope = settings.softcap, settings.slope
        # With a soft-cap the product is scaled for tanh, and the tanh is scaled afterwards.
        gain = settings.slope if self.softcap is None else settings.logit_scale / self.softcap
        self.head_gain, self.scratch_gain = (1.0, gain) if self.narrow else (gain, 1.0)
        self.cap_gain = None if self.softcap is None else self.softcap / settings.temperature
        with_keep = (
            1 if self.softcap is None else 2
        )  # tanh's derivative lies beside the logits (or beside the scratch)
        self.scratch_bytes = min(SCRATCH_BYTES, settings.chunk_bytes // 4) if self.narrow else 0
        self.chunk_bytes = settings.chunk_bytes - with_keep * self.scratch_bytes
        self.bytes_per_logit = product_dtype.itemsize * (1 if self.narrow else with_keep)
        self.keep = self.scratch = None

    def buffer(self, rows: int, columns: int, device) -> torch.Tensor:
        wide_rows = min(rows, max(1, self.scratch_bytes // (columns * 4))) if self.narrow else rows
        if self.narrow:
            self.scratch = torch.empty(wide_rows * columns, dtype=self.accumulate, device=device)
        if self.softcap is not None:
            self.keep = torch.empty(wide_rows * columns, dtype=self.accumulate, device=device)
        return torch.empty(rows, columns, dtype=self.buffer_dtype, device=device)

    def row_chunks(self, num_rows: int, columns: int, device, product_bytes: int = 0):
        """(slice, buffer[C, columns]): equal chunks of complete rows, all in one buffer.

        `product_bytes` more are needed per row.
        """
        if num_rows == 0:
            return
        most = max(1, self.chunk_bytes // (columns * self.bytes_per_logit + product_bytes))
        size = -(-num_rows // -(-num_rows // most))
        buffer = self.buffer(size, columns, device)
        for start in range(0, num_rows, size):
            stop = min(start + size, num_rows)
            yield slice(start, stop), buffer[: stop - start]

    def row_blocks(self, num_rows: int):
        """Slices of at most 4,096 rows for streaming over the vocabulary."""
        size = -(-num_rows // max(1, -(-num_rows // 4096)))
        for start in range(0, num_rows, max(size, 1)):
            yield slice(start, min(start + size, num_rows))

    def column_blocks(self, rows: int, vocabulary: int, device):
        """(slice, buffer[rows, block]): blocks of the vocabulary, all in one allocation."""
        if rows == 0:
            return
        size = min(vocabulary, max(64, self.chunk_bytes // (rows * self.bytes_per_logit) // 64 * 64))
        flat = self.buffer(rows, size, device).view(-1)
        for start in range(0, vocabulary, size):
            stop = min(start + size, vocabulary)
            yield slice(start, stop), flat[: rows * (stop - start)].view(rows, -1)

    def _wide(self, buffer_CV: torch.Tensor, write_back: bool):
        """(slice, logits[., V] to work on in place).

        The buffer itself, or the scratch with some of its rows, then written back.
        """
        rows, columns = buffer_CV.shape
        if not self.narrow:
            yield slice(0, rows), buffer_CV
            return
        size = max(1, len(self.scratch) // columns)
        for start in range(0, rows, size):
            part = buffer_CV[start : start + size]
            wide = self.scratch[: part.numel()].view(part.shape).copy_(part)
            yield (
                slice(start, start + len(part)),
                wide if self.scratch_gain == 1.0 else wide.mul_(self.scratch_gain),
            )
            if write_back:
                part.copy_(wide)

    def _cap_(self, wide_CV: torch.Tensor, gradient: bool) -> torch.Tensor | None:
        if self.softcap is None:
            return None
        keep_CV = self.keep[: wide_CV.numel()].view(wide_CV.shape) if gradient else None
        soft_cap_(wide_CV, self.cap_gain, keep_CV)
        return keep_CV

    def finish_rows_(self, buffer_CV, columns_C, forbidden_CV):
        losses_C = torch.empty(len(buffer_CV), dtype=self.accumulate, device=buffer_CV.device)
        normaliser_2C = losses_C.new_empty(2, len(buffer_CV))
        for rows, wide_CV in self._wide(buffer_CV, write_back=True):
            keep_CV = self._cap_(wide_CV, gradient=True)
            if forbidden_CV is not None:
                wide_CV.masked_fill_(forbidden_CV[rows], -torch.inf)
            losses_C[rows], normaliser_2C[:, rows] = finish_rows_(wide_CV, columns_C[rows])
            if keep_CV is not None:
                wide_CV.mul_(keep_CV)
        return losses_C, normaliser_2C

    def start_rows(self, labels_C):
        empty = torch.full(labels_C.shape, -torch.inf, dtype=self.accumulate, device=labels_C.device)
        return (
            empty,
            torch.zeros_like(empty),
            torch.zeros_like(empty),
        )  # maximum, sum of exponentials, target logit

    def extend_rows_(self, buffer_CV, labels_C, first: int, state) -> None:
        for rows, wide_CV in self._wide(buffer_CV, write_back=False):
            highest_C, total_C, target_C = (part[rows] for part in state)
            self._cap_(wide_CV, gradient=False)
            columns_C, inside_C = _local(labels_C[rows], first, wide_CV.shape[1])
            target_C.copy_(torch.where(inside_C, wide_CV.gather(1, columns_C.view(-1, 1)).view(-1), target_C))
            extend_log_sum_exp_(wide_CV, highest_C, total_C)

    def end_rows(self, state):
        highest_C, total_C, target_C = state
        log_total_C = total_C.log()
        return (highest_C - target_C).add_(log_total_C), torch.stack((highest_C, log_total_C))

    def gradient_(self, buffer_CV, columns_C, first: int, normaliser_2C, coefficient_C, forbidden_CV) -> None:
        for rows, wide_CV in self._wide(buffer_CV, write_back=True):
            keep_CV = self._cap_(wide_CV, gradient=True)
            if forbidden_CV is not None:
                wide_CV.masked_fill_(forbidden_CV[rows], -torch.inf)
            local_C, inside_C = _local(columns_C[rows], first, wide_CV.shape[1])
            gradient_(wide_CV, local_C, inside_C, normaliser_2C[:, rows], coefficient_C[rows])
            if keep_CV is not None:
                wide_CV.mul_(keep_CV)

    group_sums = staticmethod(group_sums)


def _local(labels_C: torch.Tensor, first: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels as columns of a block that starts at `first`: (column, whether it lies inside.

    0 where it does not).
    """
    inside_C = (labels_C >= first) & (labels_C < first + width)
    return torch.where(inside_C, labels_C - first, 0), inside_C
