"""Windows as numbers of catalogue entries: what tokenising and grouping need of them.

A history is a stretch of one long array of entries, so that windows of one user share its memory. Windows
over a log are coded as arrays; lists of samples one by one.

Shapes: n windows, E entries in the long array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.columns import WindowTable
from gdrt_ds.data.readers.base import Sample


@dataclass(frozen=True)
class CodedWindows:
    """Windows of a split.

    Attributes:
        entries: int32[E], catalogue entries in the order in which users took them.
        ends: integers[n], where each history ends in `entries`, itself not included.
        lengths: integers[n], items of each history.
        targets: int32[n], the catalogue entry that is each window's target.
    """

    entries: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, samples: Sequence[Sample], catalogue: Catalogue) -> CodedWindows:
        """Returns the windows with catalogue entries for items."""
        if isinstance(samples, WindowTable):
            events = samples.events
            entries = entries_of(events.item_ids, catalogue)[events.items]
            return cls(entries, samples.ends, samples.lengths, entries[samples.ends])
        index_of = catalogue.index_of
        history = [index_of[item] for sample in samples for item in sample.history]
        lengths = np.array([len(sample.history) for sample in samples], dtype=np.int32)
        targets = np.array([index_of[sample.target] for sample in samples], dtype=np.int32)
        return cls(np.array(history, dtype=np.int32), np.cumsum(lengths), lengths, targets)

    def __len__(self) -> int:
        return len(self.targets)

    def controlled(self, mode: str, seed: int) -> CodedWindows:
        """Applies a training control to the histories.

        Args:
            mode: `prompt.history`. keep leaves them; mask makes them empty; shuffle takes those of other
                windows.
        """
        if mode == "keep":
            return self
        if mode == "mask":
            return self.without_histories()
        order = np.random.Generator(np.random.PCG64([seed, 4242])).permutation(len(self))
        return replace(self, ends=self.ends[order], lengths=self.lengths[order])

    def without_histories(self) -> CodedWindows:
        """Returns the windows with empty histories."""
        return replace(self, lengths=np.zeros(len(self), dtype=np.uint8))


def target_entries(samples: Sequence[Sample], catalogue: Catalogue) -> np.ndarray:
    """int32[n]: the catalogue entry of each window's target; -1 where the catalogue does not have it."""
    if isinstance(samples, WindowTable):
        return entries_of(samples.events.item_ids, catalogue)[samples.targets]
    return entries_of([sample.target for sample in samples], catalogue)


def entries_of(item_ids: Sequence[str], catalogue: Catalogue) -> np.ndarray:
    """int32[number of ids]: the catalogue entry of each item; -1 where the catalogue does not have it."""
    return np.array([catalogue.index_of.get(item, -1) for item in item_ids], dtype=np.int32)
