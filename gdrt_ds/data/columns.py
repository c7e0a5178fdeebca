"""Windows over a log of interactions, which become samples when they are asked for.

A log of tens of millions of rows does not fit into memory as Python objects, so users and items are numbers
here, and every property of an event stands in an array. A window needs two numbers: where its target stands
among the events of its user, and how many events before it are its history.

Shapes: E events that are left after the filters, n windows of a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gdrt_ds.data.readers.base import Names, Sample

CHUNK = 1 << 18
"""Windows that are looked at at once: what is computed for them stays in the tens of megabytes."""


@dataclass(frozen=True)
class EventTable:
    """Events that are left, a user's behind each other, oldest first.

    Attributes:
        users: int32[E], number of the user in `user_names`.
        items: int32[E], place in `item_ids`.
        times: float64[E], or None.
        user_names: user ids by number.
        item_ids: item ids by number.
    """

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    user_names: Names
    item_ids: list[str]


@dataclass(frozen=True, eq=False)
class WindowTable(Sequence[Sample]):
    """The windows of a split, as a list of `Sample` that does not exist before it is asked.

    Attributes:
        events: what windows are cut from.
        ends: int32[n], the event that is the window's target.
        lengths: uint8, uint16 or int32[n], events right before the target that are its history.
    """

    events: EventTable
    ends: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = int(index)
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self._sample(place, int(self.ends[place]), int(self.lengths[place]))

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), CHUNK):
            ends = self.ends[start : start + CHUNK].tolist()
            lengths = self.lengths[start : start + CHUNK].tolist()
            for place, (end, length) in enumerate(zip(ends, lengths, strict=True), start=start):
                yield self._sample(place, end, length)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def _sample(self, place: int, end: int, length: int) -> Sample:
        events = self.events
        ids = events.item_ids
        history = tuple(ids[item] for item in events.items[end - length : end].tolist())
        time = None
        if events.times is not None:
            time = float(events.times[end])
        return Sample(place, events.user_names[int(events.users[end])], history, ids[events.items[end]], time)

    def take(self, chosen: np.ndarray | slice) -> WindowTable:
        """Returns some of the windows, numbered anew."""
        return replace(self, ends=self.ends[chosen], lengths=self.lengths[chosen])

    def chunks(self) -> Iterator[WindowTable]:
        """Yields the windows in parts of `CHUNK`."""
        for start in range(0, len(self), CHUNK):
            yield self.take(slice(start, start + CHUNK))

    @property
    def users(self) -> np.ndarray:
        """int32[n], number of each window's user."""
        return self.events.users[self.ends]

    @property
    def targets(self) -> np.ndarray:
        """int32[n], number of each window's target."""
        return self.events.items[self.ends]

    @property
    def times(self) -> np.ndarray | None:
        """float64[n], or None."""
        return None if self.events.times is None else self.events.times[self.ends]

    @property
    def longest(self) -> int:
        """Events of the longest history."""
        return int(self.lengths.max(initial=0))
