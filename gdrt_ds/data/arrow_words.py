"""Byte strings laid end to end by their numbers, at the speed of Arrow's `take`.

Arrays are made of buffers here. `pyarrow.array` would import pandas, to ask whether it was given a Series:
half a second to a second of every start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_BYTES = np.iinfo(np.int32).max
"""What the 32-bit offsets of an Arrow array of byte strings reach."""


def array_of_words(words: Sequence[bytes]) -> Any:
    """An Arrow array of byte strings.

    Raises:
        OverflowError: more than 2^31 - 1 bytes.
    """
    import pyarrow

    ends = np.cumsum([0, *map(len, words)], dtype=np.int64)
    if ends[-1] > MOST_BYTES:
        raise OverflowError(f"{ends[-1]} bytes of words, and one Arrow array of them holds {MOST_BYTES}")
    buffers = [None, pyarrow.py_buffer(ends.astype(np.int32)), pyarrow.py_buffer(b"".join(words))]
    return pyarrow.Array.from_buffers(pyarrow.binary(), len(words), buffers)


def array_of_numbers(numbers: np.ndarray) -> Any:
    """An Arrow array of int64 on the memory of this one, or of a copy that is int64."""
    import pyarrow

    values = pyarrow.py_buffer(np.ascontiguousarray(numbers, dtype=np.int64))
    return pyarrow.Array.from_buffers(pyarrow.int64(), len(numbers), [None, values])


def lay(words: Any, numbers: np.ndarray) -> memoryview:
    """The bytes of the numbered words, one word behind the other.

    Args:
        words: an Arrow array of byte strings.
        numbers: int64[n], a word may occur many times.
    """
    return memoryview(words.take(array_of_numbers(numbers)).buffers()[2])
