"""The error of a run whose loss, gradients or weights are no longer finite, and what to do about it."""

from __future__ import annotations

from gdrt_ds.errors import UserError

LOWER_RATE = (
    "lower train.lr in a new run.dir, which goes on with resume=RUN/checkpoints/step_N of this one (in its "
    "own folder a run keeps its settings), or check model.dtype (float16 overflows)"
)


class NonFiniteLoss(UserError):
    """NaN or inf on some rank; raised on every rank in the same step, before the optimizer."""
