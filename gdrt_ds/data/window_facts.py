"""What is asked of all windows of a split at once: their digest, and which of them another split has too.

Each has a plain form for any windows and one over columns for windows cut from a log; tests hold the two
equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gdrt_ds.data.arrow_words import array_of_numbers, array_of_words, lay
from gdrt_ds.data.columns import CHUNK, WindowTable
from gdrt_ds.data.readers.base import Sample

UNIT, RECORD = b"\x1f", b"\x1e"
"""What stands behind a field, and behind the last field of a record, in the text of a digest."""
EXACT = 2.0**53
"""Whole numbers below it are written by `str(float)` as their digits and `.0` (below 1e16)."""


def add_record(digest: Any, *parts: object) -> None:
    """Adds one record to a hashlib digest."""
    digest.update("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass") + RECORD)


def add_windows(digest: Any, split: str, samples: Sequence[Sample]) -> None:
    """Adds one record for each window: split, user, time, history, target and labels."""
    if isinstance(samples, WindowTable):
        for text in _records(split, samples):
            digest.update(text)
        return
    for s in samples:
        labels = (f"{k}={v}" for k, v in sorted(s.labels.items()))
        add_record(digest, split, s.user_id, s.timestamp, *s.history, s.target, *labels)


def _records(split: str, windows: WindowTable) -> Iterator[memoryview]:
    """Yields the text of the records, in parts.

    The words that occur are put into one array of byte strings; a part of the text is what `take` of Arrow
    lays end to end for the numbers of its words.
    """
    import pyarrow

    events = windows.events
    names = events.user_names
    items = [item.encode("utf-8", "surrogatepass") for item in events.item_ids]
    words = [split.encode() + UNIT, *(names.bytes_of(user) + UNIT for user in range(len(names)))]
    first_item = len(words)
    words += [item + UNIT for item in items]
    first_target = len(words)
    words += [item + RECORD for item in items]
    first_time = len(words)
    fixed = array_of_words(words)
    rows = max(1, 4 * CHUNK // (windows.longest + 4))
    for start in range(0, len(windows), rows):
        part = windows.take(slice(start, start + rows))
        lengths = part.lengths.astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths + 4)])
        word = np.zeros(offsets[-1], dtype=np.int64)
        word[offsets[:-1] + 1] = 1 + part.users
        word[offsets[:-1] + 2] = first_time + np.arange(len(part))
        owner = np.repeat(np.arange(len(part)), lengths)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        event = (part.ends - lengths)[owner] + place
        word[offsets[owner] + 3 + place] = first_item + events.items[event]
        word[offsets[1:] - 1] = first_target + part.targets
        known = pyarrow.concat_arrays([fixed, _times_as_text(part)])
        yield lay(known, word)


def _times_as_text(windows: WindowTable) -> Any:
    """`str` of each window's time with a UNIT behind it, as an Arrow array."""
    times = windows.times
    if times is None:
        return array_of_words([b"None" + UNIT] * len(windows))
    whole = (times == np.floor(times)) & (np.abs(times) < EXACT) & ~((times == 0) & np.signbit(times))
    if whole.all():
        import pyarrow
        from pyarrow import compute

        digits = array_of_numbers(times.astype(np.int64)).cast(pyarrow.string())
        return compute.binary_join_element_wise(digits, ".0\x1f", "").cast(pyarrow.binary())
    return array_of_words([str(time).encode() + UNIT for time in times.tolist()])


def also_in_train(train: Sequence[Sample], held_out: Sequence[Sample]) -> int:
    """Returns how many windows of a held-out split are windows of train: same user, history, target, time."""
    if isinstance(train, WindowTable) and isinstance(held_out, WindowTable):
        train, held_out = _suspects(train, held_out)
    held = [_content(sample) for sample in held_out]
    wanted = set(held)
    known = {content for content in map(_content, train) if content in wanted}
    return sum(content in known for content in held)


def _content(sample: Sample) -> tuple:
    return sample.user_id, sample.history, sample.target, sample.timestamp


def _suspects(train: WindowTable, held_out: WindowTable) -> tuple[WindowTable, WindowTable]:
    """The windows of both splits that may be equal to one of the other: those with equal hashes."""
    if train.events.times is not None and len(held_out):
        times = held_out.times
        train = train.take((train.times >= times.min()) & (train.times <= times.max()))
    in_train, in_held_out = _hashes(train), _hashes(held_out)
    shared = np.intersect1d(in_train, in_held_out)
    return train.take(_is_in(in_train, shared)), held_out.take(_is_in(in_held_out, shared))


def _is_in(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """bool[...]: whether each value is among `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return known[place] == values


def _hashes(windows: WindowTable) -> np.ndarray:
    """uint64[n]: equal for windows with equal content, and hardly ever for others."""
    items = windows.events.items
    hashes = np.zeros(len(windows), dtype=np.uint64)
    for start in range(0, len(windows), CHUNK):
        part = windows.take(slice(start, start + CHUNK))
        value = _mixed(part.users.astype(np.uint64), part.targets)
        if part.times is not None:
            value = _mixed(value, (part.times + 0.0).view(np.uint64))  # -0.0 and 0.0 are the same time
        lengths = part.lengths.astype(np.int64)
        for back in range(1, part.longest + 1):
            inside = back <= lengths
            value[inside] = _mixed(value[inside], items[part.ends[inside] - back])
        hashes[start : start + CHUNK] = value
    return hashes


def _mixed(value: np.ndarray, more: np.ndarray) -> np.ndarray:
    """One round of splitmix64 over a hash and the next number."""
    value = (value ^ more.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
