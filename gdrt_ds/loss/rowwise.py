"""What happens to a chunk of logits between the two matrix products: in torch, in place.

kernels.py does the same in Triton. Memory traffic is the cost: a chunk of [C, V] is read and written as few
times as torch's operators allow, and never copied.

Each function gets float32 (or float64) logits that are already multiplied by logit_scale / temperature. With
a soft-cap c they are multiplied by logit_scale / c instead, so that tanh comes first and c / temperature
afterwards.

Shapes: C rows of the chunk, V columns (the vocabulary, a block of it, or the allowed tokens of the chunk).
"""

from __future__ import annotations

import torch

SCRATCH_BYTES = 4 * 2**20
"""float32 rows that are being finished for a 2-byte head: within a CPU's second- and third-level caches."""


def soft_cap_(logits_CV: torch.Tensor, gain: float, keep_CV: torch.Tensor | None) -> None:
    """Computes logits <- gain * tanh(logits); `keep_CV` receives 1 - tanh^2, the factor of the backward."""
    logits_CV.tanh_()
    if keep_CV is not None:
        torch.mul(logits_CV, logits_CV, out=keep_CV)
        keep_CV.neg_().add_(1.0)
    logits_CV.mul_(gain)


def finish_rows_(logits_CV: torch.Tensor, columns_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finishes complete rows and leaves softmax - onehot, the gradient of each loss, in the buffer.

    Returns:
        losses[C], and normaliser[2, C]: the maximum and log sum exp(z - max). They are kept apart, because
        their sum would round away the second for large logits.
    """
    columns_C1 = columns_C.view(-1, 1)
    target_C = logits_CV.gather(1, columns_C1).view(-1)
    highest_C = logits_CV.amax(dim=1)
    torch.softmax(logits_CV, dim=1, out=logits_CV)
    # The largest probability is 1 / sum exp(z - max) and lies in [1/V, 1]: its logarithm is exact for logits
    # of any size, and torch's fused softmax needs one trip through memory.
    log_total_C = logits_CV.amax(dim=1).log_().neg_()
    _subtract_at_label_(logits_CV, columns_C1, None)
    return (highest_C - target_C).add_(log_total_C), torch.stack((highest_C, log_total_C))


def extend_log_sum_exp_(logits_CV: torch.Tensor, highest_C: torch.Tensor, total_C: torch.Tensor) -> None:
    """Takes a block of columns into the running maximum and sum of exponentials; overwrites the logits."""
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
    """Computes logits <- coefficient * (softmax - onehot) of a block of columns.

    Args:
        logits_CV: the block.
        columns_C: the label's column in this block, 0 where it lies elsewhere.
        inside_C: whether the label lies in this block.
        normaliser_2C: of the forward.
        coefficient_C: factor of each row.
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
    """Returns the float64 loss sums [G], added in a fixed order."""
    # torch's 1-D index_add_ is sequential on the CPU. CUDA's uses atomics, hence the product there.
    if losses_N.device.type == "cpu":
        return torch.zeros(num_groups, dtype=torch.float64).index_add_(0, groups_N, losses_N.double())
    member_NG = groups_N.view(-1, 1) == torch.arange(num_groups, device=losses_N.device)
    return torch.where(member_NG, losses_N.double().view(-1, 1), 0.0).sum(dim=0)


class TorchRowwise:
    """The torch part of one call: buffers, chunk sizes and the functions above with the call's settings.

    A bfloat16 or float16 head leaves its logits in a buffer of its own dtype, as a model would. Arithmetic is
    float32: a few rows at a time are widened into a scratch that stays in the CPU's cache, finished there,
    and written back.
    """

    def __init__(self, settings, product_dtype: torch.dtype):
        self.accumulate = torch.float64 if product_dtype == torch.float64 else torch.float32
        self.narrow = product_dtype.itemsize < 4
        self.buffer_dtype = product_dtype
        self.softcap = settings.softcap
        self.top_k = settings.top_k
        self.gradient_slope = settings.slope
        # With a soft-cap the product is scaled for tanh, and the tanh is scaled afterwards.
        gain = settings.slope if self.softcap is None else settings.logit_scale / self.softcap
        # The logits of a narrow head are scaled when they are widened: scaled operands would round once more.
        self.head_gain = 1.0 if self.narrow else gain
        self.scratch_gain = gain if self.narrow else 1.0
        # What is still missing in the buffer's logits: `top_k.log_probability` converts single ones.
        self.raw_gain = self.scratch_gain
        self.cap_gain = None
        copies = 1
        if self.softcap is not None:
            self.cap_gain = self.softcap / settings.temperature
            copies = 2  # tanh's derivative lies beside the logits (or beside the scratch)
        if self.narrow:
            self.scratch_bytes = min(SCRATCH_BYTES, settings.chunk_bytes // 4)
            self.bytes_per_logit = product_dtype.itemsize
        else:
            self.scratch_bytes = 0
            self.bytes_per_logit = product_dtype.itemsize * copies
        self.chunk_bytes = settings.chunk_bytes - copies * self.scratch_bytes
        self.keep: torch.Tensor | None = None
        self.scratch: torch.Tensor | None = None

    def buffer(self, rows: int, columns: int, device) -> torch.Tensor:
        """Returns an empty [rows, columns] for logits and makes the scratch that goes with it."""
        wide_rows = rows
        if self.narrow:
            wide_rows = min(rows, max(1, self.scratch_bytes // (columns * 4)))
            self.scratch = torch.empty(wide_rows * columns, dtype=self.accumulate, device=device)
        if self.softcap is not None:
            self.keep = torch.empty(wide_rows * columns, dtype=self.accumulate, device=device)
        return torch.empty(rows, columns, dtype=self.buffer_dtype, device=device)

    def row_chunks(self, num_rows: int, columns: int, device, product_bytes: int = 0):
        """Yields (slice, buffer[C, columns]): equal chunks of complete rows, all in one buffer.

        Args:
            product_bytes: bytes besides the logits that the product needs per row.
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
        """Yields slices of at most 4,096 rows for streaming over the vocabulary."""
        size = -(-num_rows // max(1, -(-num_rows // 4096)))
        for start in range(0, num_rows, max(size, 1)):
            yield slice(start, min(start + size, num_rows))

    def column_blocks(self, rows: int, vocabulary: int, device):
        """Yields (slice, buffer[rows, block]): blocks of the vocabulary, all in one allocation."""
        if rows == 0:
            return
        size = min(vocabulary, max(64, self.chunk_bytes // (rows * self.bytes_per_logit) // 64 * 64))
        flat = self.buffer(rows, size, device).view(-1)
        for start in range(0, vocabulary, size):
            stop = min(start + size, vocabulary)
            yield slice(start, stop), flat[: rows * (stop - start)].view(rows, -1)

    def _wide(self, buffer_CV: torch.Tensor, write_back: bool):
        """Yields (slice, logits[., V] to work on in place).

        They are the buffer itself, or the scratch with some of its rows, which are then written back.
        """
        rows, columns = buffer_CV.shape
        if not self.narrow:
            yield slice(0, rows), buffer_CV
            return
        size = max(1, len(self.scratch) // columns)
        for start in range(0, rows, size):
            part = buffer_CV[start : start + size]
            wide = self.scratch[: part.numel()].view(part.shape).copy_(part)
            if self.scratch_gain != 1.0:
                wide.mul_(self.scratch_gain)
            yield slice(start, start + len(part)), wide
            if write_back:
                part.copy_(wide)

    def _cap_(self, wide_CV: torch.Tensor, gradient: bool) -> torch.Tensor | None:
        """Applies the soft-cap, if there is one; returns tanh's derivative where the gradient needs it."""
        if self.softcap is None:
            return None
        keep_CV = None
        if gradient:
            keep_CV = self.keep[: wide_CV.numel()].view(wide_CV.shape)
        soft_cap_(wide_CV, self.cap_gain, keep_CV)
        return keep_CV

    def finish_rows_(self, buffer_CV, columns_C, forbidden_CV):
        """Complete rows: as the function of this name, with soft-cap and forbidden columns."""
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
        """Returns the state of rows read block by block: maximum, sum of exponentials, target logit."""
        highest_C = torch.full(labels_C.shape, -torch.inf, dtype=self.accumulate, device=labels_C.device)
        return highest_C, torch.zeros_like(highest_C), torch.zeros_like(highest_C)

    def extend_rows_(self, buffer_CV, labels_C, first: int, state) -> None:
        """Takes a block of columns that starts at `first` into the state."""
        for rows, wide_CV in self._wide(buffer_CV, write_back=False):
            highest_C, total_C, target_C = (part[rows] for part in state)
            self._cap_(wide_CV, gradient=False)
            columns_C, inside_C = _local(labels_C[rows], first, wide_CV.shape[1])
            target_C.copy_(torch.where(inside_C, wide_CV.gather(1, columns_C.view(-1, 1)).view(-1), target_C))
            extend_log_sum_exp_(wide_CV, highest_C, total_C)

    def end_rows(self, state):
        """Returns losses[C] and normaliser[2, C] of rows whose blocks have all been read."""
        highest_C, total_C, target_C = state
        log_total_C = total_C.log()
        return (highest_C - target_C).add_(log_total_C), torch.stack((highest_C, log_total_C))

    def gradient_(self, buffer_CV, columns_C, first: int, normaliser_2C, coefficient_C, forbidden_CV) -> None:
        """A block of columns from `first` on: as the function of this name, with the call's settings."""
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
    """Returns labels as columns of a block from `first` on (0 outside), and whether they lie inside."""
    inside_C = (labels_C >= first) & (labels_C < first + width)
    return torch.where(inside_C, labels_C - first, 0), inside_C
