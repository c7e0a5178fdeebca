"""How often train has each item: every interaction once, although sliding windows repeat it.

Windows of one user are put in time order and stitched where the end of one is the beginning of the next.
What remains is the user's sequence, whose elements are counted. Windows sampled with gaps between them give
separate pieces.

Windows over a log need no stitching where a user's windows follow each other without a gap: the events that
they cover are counted. Stitching compares items, so it differs from that where items repeat in a way that
makes a window look like another. Such users are found first and stitched as all others once were.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gdrt_ds.data.columns import WindowTable
from gdrt_ds.data.readers.base import Sample


def count_items(samples: Sequence[Sample]) -> Counter[str]:
    """Returns item id -> interactions in these windows."""
    if isinstance(samples, WindowTable):
        return _count_in_log(samples)
    of_user: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        of_user[sample.user_id].append(sample)
    counts: Counter[str] = Counter()
    for own in of_user.values():
        own.sort(key=lambda s: s.timestamp if s.timestamp is not None else 0.0)
        counts.update(_stitched([*sample.history, sample.target] for sample in own))
    return counts


def count_in_histories(samples: Sequence[Sample]) -> Counter[str]:
    """Returns item id -> how often it stands in a history; windows that slide over it count each."""
    if not isinstance(samples, WindowTable):
        counts: Counter[str] = Counter()
        for sample in samples:
            counts.update(sample.history)
        return counts
    events = samples.events
    num = len(events.items)
    # A history covers the events from its start to its end: plus one at the start, minus one at the end.
    edges = np.bincount(samples.ends - samples.lengths.astype(np.int64), minlength=num)
    edges -= np.bincount(samples.ends, minlength=num)
    of_item = np.bincount(events.items, np.cumsum(edges[:num]), len(events.item_ids)).astype(np.int64)
    return Counter({events.item_ids[item]: int(of_item[item]) for item in np.flatnonzero(of_item).tolist()})


def _stitched(windows: Iterable[list[Any]]) -> Counter[Any]:
    """Counts the elements of one user's windows, which come in time order."""
    pieces: list[list[Any]] = []
    for window in windows:
        _stitch(pieces, window)
    counts: Counter[Any] = Counter()
    for piece in pieces:
        counts.update(piece)
    return counts


def _stitch(pieces: list[list[Any]], window: list[Any]) -> None:
    """Adds a window to the last piece it overlaps.

    At equal times windows may come in any order, so both ends are tried.
    """
    for piece in reversed(pieces[-3:]):
        for overlap in range(min(len(piece), len(window)), 0, -1):
            if piece[-overlap:] == window[:overlap]:
                piece.extend(window[overlap:])
                return
            if piece[:overlap] == window[-overlap:]:
                piece[:0] = window[:-overlap]
                return
        if any(piece[i : i + len(window)] == window for i in range(len(piece) - len(window))):
            return
    pieces.append(window)


def _count_in_log(windows: WindowTable) -> Counter[str]:
    events = windows.events
    order = np.argsort(windows.ends, kind="stable")  # a user's windows together, in time order
    ends = windows.ends[order].astype(np.int64)
    lengths = windows.lengths[order].astype(np.int64)
    if not len(ends):
        return Counter()
    users = events.users[ends]
    opens = np.concatenate([[True], users[1:] != users[:-1]])
    first = np.flatnonzero(opens)
    of_user = np.cumsum(opens) - 1
    start = (ends - lengths)[first]  # of each user's first window

    doubtful = np.zeros(len(first), dtype=bool)
    gap = np.concatenate([[False], ends[1:] != ends[:-1] + 1]) & ~opens
    doubtful[of_user[gap]] = True
    later = np.flatnonzero(~opens & (ends - start[of_user] > lengths))
    doubtful[of_user[_looks_like_another(events.items, ends, lengths, start[of_user], later)]] = True

    last = ends[np.append(first[1:], len(ends)) - 1]
    edges = np.zeros(len(events.items) + 1, dtype=np.int8)
    edges[start[~doubtful]] += 1
    edges[last[~doubtful] + 1] -= 1
    covered = np.cumsum(edges[:-1], dtype=np.int8).astype(bool)
    counts = np.bincount(events.items[covered], minlength=len(events.item_ids))
    bounds = np.append(first, len(ends))
    for user in np.flatnonzero(doubtful).tolist():
        own = range(bounds[user], bounds[user + 1])
        of_items = _stitched(events.items[ends[w] - lengths[w] : ends[w] + 1].tolist() for w in own)
        for item, count in of_items.items():
            counts[item] += count
    return Counter({events.item_ids[item]: int(counts[item]) for item in np.flatnonzero(counts).tolist()})


def _looks_like_another(
    items: np.ndarray, ends: np.ndarray, lengths: np.ndarray, start: np.ndarray, windows: np.ndarray
) -> np.ndarray:
    """Returns those of `windows` whose items stitching would take for items that it has already.

    That is, items of the window right before (all equal), or of the user's first window.

    Args:
        start: event where the stitched piece begins, by window.
    """
    found = []
    for other_end in (ends - 1, start + lengths):
        alive = windows
        for back in range(int(lengths[windows].max(initial=-1)) + 1):
            place = back <= lengths[alive]
            same = items[ends[alive] - back * place] == items[other_end[alive] - back * place]
            alive = alive[same | ~place]
            if not len(alive):
                break
        found.append(alive)
    return np.concatenate(found)
