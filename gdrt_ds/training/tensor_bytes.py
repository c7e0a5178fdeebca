"""Counts the bytes of tensors that are alive, whoever holds them: Python, autograd, the engine or C++.

Resident memory says how much a process keeps, not what for. This counts storages from their creation to their
end, by dtype, so that a benchmark or a test can ask at any point of a step: which bytes of the packed
base are alive now, and how high did the sum rise?

    with TensorBytes() as tensors:
        loss = engine(batch)
        held = tensors.alive(torch.uint8)
        engine.backward(loss)
    print(held, tensors.peak_bytes)

It slows every operation down. It belongs into measurements, not into training.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Follows every storage that an operation makes while this context is entered.

    Storages that existed before are not counted if `besides` holds them, as a parameter's slice, or if only
    views of them are made.

    Args:
        besides: tensors whose storages are not counted.
    """

    def __init__(self, besides=()):
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in besides}
        self._alive: dict[int, tuple[StorageWeakRef, int, torch.dtype]] = {}
        self._sum = 0
        self.peak_bytes = 0
        """Largest sum of all storages at any time since the start or `reset_peak`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in before:
                self._add(leaf)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        found = self._alive.get(key)
        if found is not None and not found[0].expired():
            return
        self._forget_ended()
        self._alive[key] = (StorageWeakRef(storage), storage.nbytes(), tensor.dtype)
        self._sum += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._sum)

    def _forget_ended(self) -> None:
        ended = [key for key, (reference, _, _) in self._alive.items() if reference.expired()]
        for key in ended:
            self._sum -= self._alive.pop(key)[1]

    def alive(self, dtype: torch.dtype | None = None, at_least: int = 0) -> int:
        """Returns the bytes alive now.

        Args:
            dtype: counts storages that were made with this dtype; None = all.
            at_least: leaves out storages with fewer bytes.
        """
        self._forget_ended()
        return sum(
            size
            for _, size, made_as in self._alive.values()
            if (dtype is None or made_as == dtype) and size >= at_least
        )

    def reset_peak(self) -> None:
        """Starts the peak again from what is alive now."""
        self._forget_ended()
        self.peak_bytes = self._sum
