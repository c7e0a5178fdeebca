"""The one packed all-reduce of an optimizer step: it carries everything that ranks must agree on.

Weights are computed from the reduced buffer only, so they are bitwise equal on all ranks.
Notation (method.md): G groups, S[G] loss sums, n[G] token counts, L = S / n.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

CONTROL_SLOTS = ("nonfinite", "stop")


class StepBuffer:
    """The one packed all-reduce of an optimizer step: [S (G) | n (G) | control slots | optional token
    losses].

    Every rank adds what it measured and takes part, also with no tokens at all; the sum is all that
    anybody reads.
    """

    def __init__(self, num_groups: int, device, num_token_slots: int = 0):
        self.num_groups = num_groups
        self.data = torch.zeros(
            2 * num_groups + len(CONTROL_SLOTS) + num_token_slots, dtype=torch.float64, device=device
        )
        self._work = None

    def add(self, loss_sums: Tensor, counts: Tensor) -> None:
        """Adds one micro-batch: loss_sums [G] (detached here), counts [G]."""
        groups = self.num_groups
        sums = loss_sums.detach().to(self.data)
        self.data[:groups] += torch.nan_to_num(sums, 0.0, 0.0, 0.0)
        self.data[groups : 2 * groups] += counts.to(self.data)
        self.data[2 * groups] += (~torch.isfinite(sums)).any().to(self.data)

    def add_tokens(self, slots: Tensor, token_losses: Tensor) -> None:
        """Puts single token losses into their slot of the global batch (token-level CVaR)."""
        start = 2 * self.num_groups + len(CONTROL_SLOTS)
        self.data[start + slots] = token_losses.detach().to(self.data)

    def request_stop(self) -> None:
        self.data[2 * self.num_groups + 1] += 1

    def reduce(self, async_op: bool = False) -> StepBuffer:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._work = dist.all_reduce(self.data, op=dist.ReduceOp.SUM, async_op=async_op)
        return self

    def wait(self) -> StepBuffer:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self

    @property
    def loss_sums(self) -> Tensor:
        return self.data[: self.num_groups]

    @property
    def counts(self) -> Tensor:
        return self.data[self.num_groups : 2 * self.num_groups]

    @property
    def losses(self) -> Tensor:
        """L[G]; absent groups are 0 here and must be masked by `present`."""
        return self.loss_sums / self.counts.clamp_min(1)

    @property
    def present(self) -> Tensor:
        return self.counts > 0

    @property
    def token_losses(self) -> Tensor:
        return self.data[2 * self.num_groups + len(CONTROL_SLOTS) :]

    def flags(self) -> tuple[bool, bool]:
        """(non-finite seen on some rank, stop requested on some rank).

        The step's one host synchronisation.
        """
        nonfinite, stop = self.data[2 * self.num_groups : 2 * self.num_groups + 2].tolist()
        return nonfinite > 0, stop > 0


def assert_equal_on_all_ranks(value: Tensor, name: str) -> None:
    """Debug mode: proves that `value` is bitwise equal on every rank (extra collectives)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    bits = value.detach().double().contiguous().view(torch.int64)
    low, high = bits.clone(), bits.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise RuntimeError(
            f"{name} differs between ranks: this must never happen; please report it with the run's "
            "config.yaml"
        )
