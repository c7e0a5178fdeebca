"""What an attention backend says of itself. Each file beside this one is one backend and binds `BACKEND`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gdrt_ds.models.source import dtype_name

AMPERE = (8, 0)  # compute capability from which flash-attn has kernels
HALF = (torch.bfloat16, torch.float16)
PACKINGS = ("packed", "shared_prefix", "prefix_tree")
"""The values of train.packing that put several samples into one row."""


@dataclass(frozen=True)
class Place:
    """Where attention is to run.

    Attributes:
        device: the device of the model.
        dtype: the dtype of the computation.
        architecture: transformers' class of the model; None for remote code, or where it is not known yet.
    """

    device: torch.device
    dtype: torch.dtype
    architecture: type | None = None

    def __str__(self) -> str:
        return f"{self.device.type} in {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Obstacle:
    """Why a backend cannot run at a place.

    Attributes:
        reason: a few words, with which `auto` explains why it took the next backend.
        problem: what follows `model.attention = NAME` where the user asked for this backend.
        fix: what the user can do.
        only_auto: the backend may run here, so it is refused to `auto` but not to a user who asks for it.
    """

    reason: str
    problem: str = ""
    fix: str = "set model.attention to auto or sdpa"
    only_auto: bool = False


def no_obstacle(place: Place) -> Obstacle | None:
    """The backend runs everywhere."""
    return None


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention. A backend that transformers does not know registers itself when imported.

    Attributes:
        implementation: transformers' name of it (`attn_implementation`).
        obstacle: says why the backend cannot run at a place, None where it can.
        packings: values of `train.packing` that put several samples into one row and that it can follow.
        packed_by: transformers' name of the attention that then stands in for it: the tree attention of
            gdrt_ds/batches/tree_attention.py, which builds on SDPA, or another that takes a layout.
        dense_masks: takes an explicit mask [B, 1, T, P + T], which scoring the catalogue needs.
        chosen_because: with which words `auto` explains that it took this backend; empty = with the reason
            why the one before could not run.
    """

    implementation: str
    obstacle: Callable[[Place], Obstacle | None] = no_obstacle
    packings: tuple[str, ...] = ()
    packed_by: str = "gdrt_tree"
    dense_masks: bool = False
    chosen_because: str = ""


def needs_sdpa(place: Place) -> Obstacle | None:
    """The obstacle of backends that build on SDPA: some models cannot run on it (Gemma-2 caps its scores)."""
    if place.architecture is None or place.architecture._supports_sdpa:
        return None
    name = place.architecture.__name__
    return Obstacle(
        f"{name} does not run on SDPA",
        f": {name} does not support it",
        "set model.attention to auto or eager",
    )


def needs_flash_kernel(place: Place, package: str) -> Obstacle | None:
    """The obstacle of the flash-attn kernels: they need a GPU from Ampere on, 16 bits and their package."""
    problem = f" runs on a GPU in bfloat16 or float16, here {place}"
    if place.device.type != "cuda":
        return Obstacle(f"flash-attn needs a GPU, this is {place.device.type}", problem)
    if place.dtype not in HALF:
        return Obstacle(f"dtype {dtype_name(place.dtype)} is not 16 bit", problem)
    if torch.cuda.is_available() and torch.cuda.get_device_capability(place.device) < AMPERE:
        name = torch.cuda.get_device_name(place.device)
        return Obstacle(f"{name} is older than Ampere", f" needs an Ampere GPU or a later one, here {name}")
    if importlib.util.find_spec(package) is None:
        fix = "pip install flash-attn, or set model.attention to auto"
        return Obstacle("flash-attn is not installed", f": {package} is not installed", fix)
    return None
