"""What the fused loss refuses: shapes, labels, groups and settings that do not fit.

Values on a GPU are checked there by an assertion. Reading the answer would stop the host at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdrt_ds.errors import UserError

ALLOWED_FIX = (
    "the label must be a child of its trie node; build the trie and the labels from the same target_ids"
)


def require(holds: Tensor, problem: str, fix: str) -> None:
    """Checks that all entries hold.

    Raises:
        UserError: on CPUs, one does not. On other devices the device asserts.
    """
    if holds.device.type != "cpu":
        torch._assert_async(holds.all(), f"{problem}; {fix}")
    elif not bool(holds.all()):
        row = int((~holds).nonzero()[0])
        raise UserError(f"{problem} (entry {row} of those checked)", fix)


def check_range(name: str, values: Tensor, stop: int, fix: str) -> None:
    """Checks that integers lie in [0, stop); raises as `require` does."""
    if values.device.type != "cpu":
        torch._assert_async(((values >= 0) & (values < stop)).all(), f"{name} must lie in [0, {stop}); {fix}")
    elif len(values) and (int(values.min()) < 0 or int(values.max()) >= stop):
        raise UserError(
            f"{name} holds values {int(values.min())}..{int(values.max())}, but must lie in [0, {stop})", fix
        )


def check_positive(name: str, value: float | None) -> None:
    """Raises UserError for a number that is given and not above 0."""
    if value is not None and not value > 0:
        raise UserError(f"{name} is {value}, but must be positive", f"set {name} to a positive number")


def check_shapes(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N]
    groups: Tensor,  # [N]
    num_groups: int,
    bias: Tensor | None,  # [V]
    lora: tuple[Tensor, Tensor, float] | None,  # A[r, H], B[V, r], scale
) -> None:
    """Raises UserError for a tensor whose shape does not fit the others."""

    def expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            expected = (
                f"with hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} it must be {shape}"
            )
            raise UserError(f"{name} has shape {tuple(tensor.shape)}", expected)

    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise UserError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}",
            "pass hidden [N, H] and weight [V, H]; under ZeRO-3 call the op inside the forward of the "
            "module that owns the head",
        )
    expect("labels", labels, (hidden.shape[0],))
    expect("groups", groups, (hidden.shape[0],))
    if num_groups < 1:
        raise UserError(f"num_groups is {num_groups}", "use at least one group")
    if bias is not None:
        expect("bias", bias, (weight.shape[0],))
    if lora is not None:
        rank = lora[0].shape[0]
        expect("lora A", lora[0], (rank, hidden.shape[1]))
        expect("lora B", lora[1], (weight.shape[0], rank))
