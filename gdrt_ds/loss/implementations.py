"""Which implementation of the fused loss runs on a device, and why: torch or the Triton kernels."""

from __future__ import annotations

import logging
from functools import cache

import torch

from gdrt_ds.errors import UserError
from gdrt_ds.loss.head import product_dtype

log = logging.getLogger("gdrt_ds.loss")

IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")


def check_implementation(implementation: str) -> None:
    """Raises UserError for a name that is none of `IMPLEMENTATIONS`."""
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation is {implementation!r}", f"use one of {', '.join(IMPLEMENTATIONS)}")


@cache
def choose(implementation: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """Returns "torch" or "triton", and why in words.

    Raises:
        UserError: `triton` is asked for and cannot be used.
    """
    if implementation == "torch":
        return "torch", "asked for"
    problem = _triton_problem(device_type, dtype)
    if implementation == "triton":
        if problem:
            raise UserError(
                f"implementation='triton' cannot be used: {problem}",
                "use implementation='auto' or install triton",
            )
        return "triton", "asked for"
    if device_type == "cpu":
        return "torch", "CPU tensors"
    if problem:
        return "torch", f"slower than the Triton kernels, but {problem}"
    return "triton", f"{device_type} tensors"


def _triton_problem(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot be used, or None."""
    try:
        from gdrt_ds.loss import kernels
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernels.why_unusable(device_type, dtype)


@cache
def announce(implementation: str, why: str, device_type: str, dtype: torch.dtype) -> str:
    """Logs the choice once, as a warning where a faster way is missing; returns the line."""
    product, reason = product_dtype(dtype, device_type)
    line = f"group loss: {implementation} ({why}); head {dtype} multiplied in {product} ({reason})"
    level = logging.WARNING if "slower" in why else logging.INFO
    log.log(level, line)
    return line


def describe(
    device_type: str = "cpu", dtype: torch.dtype = torch.float32, implementation: str = "auto"
) -> str:
    """Returns one line: the implementation and the dtype of products that a head of `dtype` gets, and why."""
    return announce(*choose(implementation, device_type, dtype), device_type, dtype)
