"""A log of interactions as columns, and windows over it that become samples when they are asked for.

A log of tens of millions of rows does not fit into memory as Python objects, so users and items are numbers
here, and every property of an event stands in an array. A window needs two numbers: where its target stands
among the events of its user, and how many events before it are its history.

Shapes: R rows of the log, E events that are left after the filters, n windows of a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gdrt_ds.data.readers.base import Interactions, Item, Sample
from gdrt_ds.errors import UserError

CHUNK = 1 << 18
"""Windows that are looked at at once: what is computed for them stays in the tens of megabytes."""


class Names(Sequence[str]):
    """Texts behind each other in one buffer; a list of them would take five times the memory.

    Attributes:
        data: uint8, UTF-8 of all texts.
        offsets: int64[number + 1], where each text begins.
    """

    def __init__(self, data: np.ndarray, offsets: np.ndarray):
        self.data = data
        self.offsets = offsets

    @classmethod
    def of(cls, texts: Sequence[str]) -> Names:
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        return cls(np.frombuffer(b"".join(parts), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):
        return self.bytes_of(index).decode("utf-8", "surrogatepass")

    def bytes_of(self, index: int) -> bytes:
        """UTF-8 of one text."""
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()


@dataclass
class InteractionColumns:
    """What a reader found: `Interactions` as arrays, in file order.

    Attributes:
        users_of: int32[R], number of the user in `user_names`.
        items_of: int32[R], place of the item in `items`.
        times: float64[R], or None where the files have none.
        ratings: float64[R], or None likewise.
        user_names: user ids by number.
        items: item id -> Item; their order gives the numbers.
        users, domain, notes: as in `Interactions`.
    """

    users_of: np.ndarray
    items_of: np.ndarray
    times: np.ndarray | None
    ratings: np.ndarray | None
    user_names: Names
    items: dict[str, Item]
    users: dict[str, dict[str, str]] = field(default_factory=dict)
    domain: str = "item"
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, events: Interactions) -> InteractionColumns:
        """Returns the columns of a reader's lists.

        Raises:
            UserError: an interaction names an item that the reader's item table does not have.
        """
        number: dict[str, int] = {}
        users = [number.setdefault(user, len(number)) for user in events.users_of]
        place = {item: index for index, item in enumerate(events.items)}
        try:
            items = [place[item] for item in events.items_of]
        except KeyError as missing:
            raise UserError(
                f"item id {missing.args[0]} has no title", "give every item of the interactions a title"
            ) from None
        return cls(
            np.array(users, np.int32),
            np.array(items, np.int32),
            None if events.timestamps is None else np.array(events.timestamps, np.float64),
            None if events.ratings is None else np.array(events.ratings, np.float64),
            Names.of(list(number)),
            events.items,
            events.users,
            events.domain,
            list(events.notes),
        )


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
