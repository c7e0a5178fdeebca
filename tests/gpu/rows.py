"""What a part of the GPU check gets and gives back: a place, and rows of one table."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Spot:
    """Where a part runs.

    Attributes:
        device: `cuda`, or `cpu` with --dry, where everything has toy size and no bound is about speed.
        layers: decoder layers of the training step.
        folder: for what a part writes.
    """

    device: torch.device
    layers: int
    folder: str

    @property
    def dry(self) -> bool:
        return self.device.type != "cuda"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured, in a few words.
        found: the figure with its unit, or the words.
        bound: what it must keep; empty where it is reported only.
        kept: whether it does; None where there is no bound or it could not be measured.
    """

    what: str
    found: str
    bound: str = ""
    kept: bool | None = None

    def line(self) -> str:
        return json.dumps(asdict(self))


def at_most(what: str, value: float, bound: float, unit: str = "") -> Row:
    """A figure that must not exceed its bound; one that is not a number does."""
    return Row(what, f"{value:.3g}{unit}", f"at most {bound:.3g}{unit}", bool(value <= bound))


def same(what: str, found: object, wanted: object) -> Row:
    """A value that must be the wanted one."""
    return Row(what, str(found), str(wanted), found == wanted)


def passes(what: str, check, *args, **options) -> Row:
    """A check that raises AssertionError where it fails."""
    try:
        check(*args, **options)
    except AssertionError as error:
        return Row(what, f"fails {str(error)[:80]}".strip(), "passes", False)
    return Row(what, "passes", "passes", True)


def seconds_of(action, device: torch.device, repeats: int) -> float:
    """Least seconds of one call, with the device's queue empty before and after."""
    least = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - started)
    return least
