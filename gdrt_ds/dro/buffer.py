"""The one packed all-reduce of an optimizer step: it carries everything that ranks must agree on.

Weights are computed from the reduced buffer only, so they are bitwise equal on all ranks.
Notation (method.md): G groups, S[G] loss sums, n[G] token counts, L = S / n.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

CONTROL_SLOTS = ("nonfinite", "stop", "tokens")


class StepBuffer:
    """The data of the all-reduce: [S (G) | n (G) | control slots | optional token losses], float64.

    Every rank adds what it measured and takes part, also with no tokens at all. The sum is all that
    anybody reads.
    """

    def __init__(self, num_groups: int, device, num_token_slots: int = 0):
        self.num_groups = num_groups
        self.data = torch.zeros(
            2 * num_groups + len(CONTROL_SLOTS) + num_token_slots, dtype=torch.float64, device=device
        )
        self._work = None

    def add(self, loss_sums: Tensor, counts: Tensor) -> None:
        """Adds one micro-batch.

        Args:
            loss_sums: [G]; detached here.
            counts: [G].
        """
        groups = self.num_groups
        sums = loss_sums.detach().to(self.data)
        self.data[:groups] += torch.nan_to_num(sums, 0.0, 0.0, 0.0)
        self.data[groups : 2 * groups] += counts.to(self.data)
        self.data[2 * groups] += (~torch.isfinite(sums)).any().to(self.data)

    def count_tokens(self, num_tokens: int) -> None:
        """Adds the tokens that one micro-batch computed, for the log: no rank knows those of the others."""
        self.data[2 * self.num_groups + 2] += num_tokens

    def add_tokens(self, slots: Tensor, token_losses: Tensor) -> None:
        """Puts single token losses into their slots of the global batch (token-level CVaR)."""
        start = 2 * self.num_groups + len(CONTROL_SLOTS)
        self.data[start + slots] = token_losses.detach().to(self.data)

    def request_stop(self) -> None:
        """Asks all ranks to stop after this step."""
        self.data[2 * self.num_groups + 1] += 1

    def reduce(self, async_op: bool = False) -> StepBuffer:
        """Adds up over all ranks; with `async_op`, `wait` must be called before anything is read."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._work = dist.all_reduce(self.data, op=dist.ReduceOp.SUM, async_op=async_op)
        return self

    def wait(self) -> StepBuffer:
        """Waits for an asynchronous `reduce`."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self

    @property
    def loss_sums(self) -> Tensor:
        """S[G]."""
        return self.data[: self.num_groups]

    @property
    def counts(self) -> Tensor:
        """n[G]."""
        return self.data[self.num_groups : 2 * self.num_groups]

    @property
    def losses(self) -> Tensor:
        """L[G]; absent groups are 0 here and must be masked by `present`."""
        # Counts may be sums of token weights, and these may be below 1.
        return self.loss_sums / torch.where(self.present, self.counts, 1.0)

    @property
    def present(self) -> Tensor:
        """bool[G]: whether the group has tokens in this step."""
        return self.counts > 0

    @property
    def tokens(self) -> Tensor:
        """Tokens of `count_tokens`, float64[]."""
        return self.data[2 * self.num_groups + 2]

    @property
    def token_losses(self) -> Tensor:
        """The losses of `add_tokens`, in their slots."""
        return self.data[2 * self.num_groups + len(CONTROL_SLOTS) :]

    def flags(self) -> tuple[bool, bool]:
        """Returns whether some rank saw a non-finite loss, and whether some rank was asked to stop.

        It is the step's one host synchronisation.
        """
        nonfinite, stop = self.data[2 * self.num_groups : 2 * self.num_groups + 2].tolist()
        return nonfinite > 0, stop > 0


def assert_equal_on_all_ranks(value: Tensor, name: str) -> None:
    """Raises if `value` is not bitwise equal on every rank; for debugging, as it needs more collectives."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    bits = value.detach().double().contiguous().view(torch.int64)
    low = bits.clone()
    high = bits.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise RuntimeError(
            f"{name} differs between ranks: this must never happen; please report it with the run's "
            "config.yaml"
        )
