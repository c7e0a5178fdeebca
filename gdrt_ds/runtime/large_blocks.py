"""Memory of freed tensors goes back to the system at once.

glibc serves a large block by a mapping of its own, and gives it back when it is freed. But with every such
block it raises the size from which it does so, up to 32 MB, and then large tensors lie in the heap, which
shrinks only from its end. Work that fills and frees one tensor after the other ends with a heap of holes.
"""

from __future__ import annotations

import contextlib
import ctypes

LARGE = 1 << 20
"""Bytes from which a block gets a mapping of its own. Smaller ones are too many for the kernel."""
M_MMAP_THRESHOLD = -3
"""The parameter's number in glibc's malloc.h."""


def map_large_blocks() -> None:
    """Fixes the size from which glibc maps blocks, for this process; other C libraries are left alone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
