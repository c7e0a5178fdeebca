"""Measures what the memory plan predicts: the peak of a rank's memory from before the model is loaded on.

On a GPU it is the peak of allocated tensor bytes (`torch.cuda.max_memory_allocated`). On a CPU it is resident
memory beyond what the process held when the measurement began (imports and data), from Linux's high-water
mark; elsewhere it is None.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch
import torch.distributed as dist

STATUS, CLEAR, MAPS = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/maps")
LEAN_ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


def format_bytes(count: int | None) -> str:
    if count is None:
        return "unknown on this system"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def cpu_allocator() -> str:
    """The allocator behind this process's host memory.

    One that reuses aligned blocks well, when preloaded, else "glibc" (or the system's own).
    """
    loaded = ""
    with contextlib.suppress(OSError):
        loaded = MAPS.read_text()
    return next((name for name in LEAN_ALLOCATORS if f"lib{name}" in loaded), "glibc")


class PeakMemory:
    """Starts measuring when it is made."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(
                0
            )  # glibc's freed blocks go back: what follows must not hide in them
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")  # the high-water mark starts again at the present resident size
        self.before = _kilobytes("VmRSS")

    def bytes_here(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = _kilobytes("VmHWM")
        return None if peak is None or self.before is None else max(0, peak - self.before) * 1024

    def largest(self) -> int | None:
        """The largest of all ranks; every rank must call it."""
        here = self.bytes_here()
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return here
        found = torch.tensor([-1 if here is None else here], dtype=torch.int64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return None if found.item() < 0 else int(found.item())


def _kilobytes(key: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1])
    return None
