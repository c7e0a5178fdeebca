"""Attention backends: one file each. `choose_attention` says which one a run uses, and why.

`model.attention` names a backend by its file, or is `auto`. To add a backend, put one file into this folder
that binds `BACKEND` (docs/extending.md). `auto` keeps to its stated order and never takes a new
backend, which is there for those who ask for it.
"""

from __future__ import annotations

import torch

from gdrt_ds import registry
from gdrt_ds.errors import UserError
from gdrt_ds.models.attention.base import AttentionBackend, Obstacle, Place

__all__ = [
    "AUTO_ORDER",
    "AttentionBackend",
    "Obstacle",
    "Place",
    "choose_attention",
    "get_backend",
    "packed_attention",
]

AUTO_ORDER = ("flash_attention_3", "flash_attention_2", "sdpa", "eager")
"""The order in which `auto` tries the backends: it takes the first that can run. Eager runs everywhere."""


def get_backend(name: str) -> AttentionBackend:
    """Returns the backend of a file of this folder.

    Raises:
        UserError: there is no such backend; the message gives the nearest name.
    """
    return registry.find_part(__name__, "BACKEND", name, "model.attention")


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype, architecture: type | None = None
) -> tuple[str, str]:
    """Returns transformers' name of the attention to use, and the line to announce.

    Args:
        requested: `model.attention`: the name of a backend, or `auto`.
        device: the device of the model.
        dtype: the dtype of the computation.
        architecture: transformers' class of the model; None where it is not known.

    Raises:
        UserError: the requested backend does not exist, is not installed, or does not run on this device, in
            this dtype or with this model.
    """
    place = Place(device, dtype, architecture)
    if requested == "auto":
        return _first_that_runs(place)
    backend = get_backend(requested)
    obstacle = backend.obstacle(place)
    if obstacle is not None and not obstacle.only_auto:
        raise UserError(f"model.attention = {requested}{obstacle.problem}", obstacle.fix)
    return backend.implementation, f"attention: {requested} (as set)"


def _first_that_runs(place: Place) -> tuple[str, str]:
    reason = ""
    for name in AUTO_ORDER:
        backend = get_backend(name)
        obstacle = backend.obstacle(place)
        if obstacle is None:
            why = backend.chosen_because or reason
            return backend.implementation, f"attention: {name} (auto: {why})"
        reason = obstacle.reason
    raise UserError(f"no attention of {', '.join(AUTO_ORDER)} runs here: {reason}", "use another model")


def packed_attention(requested: str, packing: str, place: Place) -> str | None:
    """Returns transformers' name of the attention for rows of several samples, None for rows of one.

    Args:
        requested: `model.attention`.
        packing: what `choose_packing` chose.
        place: where the attention runs. With `auto` and rows that share nothing, flash-attn is taken where
            it runs; it cannot share a prompt prefix.
    """
    if packing == "none":
        return None
    name = requested
    if requested == "auto":
        name = next(name for name in AUTO_ORDER if get_backend(name).obstacle(place) is None)
    backend = get_backend(name)
    if packing not in backend.packings:
        backend = get_backend("sdpa")
    return backend.packed_by


def takes_dense_masks(implementation: str) -> bool:
    """Whether an attention, by transformers' name, takes an explicit mask; unknown ones are taken not to."""
    return any(
        backend.dense_masks
        for backend in registry.parts(__name__, "BACKEND").values()
        if backend.implementation == implementation
    )
