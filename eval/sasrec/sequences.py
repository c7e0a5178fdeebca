"""Train windows as sequences of catalogue entries.

Windows of one user overlap: the history of one is the end of the one before. They are stitched to the
user's run of items (`gdrt_ds.data.growing.stitch`), and runs are cut into segments of up to `max_history`
targets, each of which has the segment's items before it as its history. The targets are exactly those of the
train windows, each once per epoch. An item that only ever stands in histories is no target.

Letters: S segments, T slots (the start token and up to `max_history` items), V valid windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import Corpus, Sample
from gdrt_ds.data.growing import stitch

NO_TARGET = -100

MAX_VALID = 5_000
"""Valid windows that choose epoch and setting; a seeded sample of them where there are more."""


@dataclass(frozen=True)
class Histories:
    """Histories in the form that the network reads.

    Attributes:
        ids: int64[n, T], the start token, the newest items of the history, then padding.
        last: int64[n], the slot of the history's last item.
    """

    ids: np.ndarray
    last: np.ndarray


@dataclass(frozen=True)
class Sequences:
    """What SASRec learns from, and what it is chosen on.

    Attributes:
        num_items: catalogue entries; also the id of the start token.
        max_history: items of the longest train history.
        items: int64, all runs one behind the other.
        begins: int64[runs + 1], where each run begins in `items`.
        first: int64[runs], place of a run's first target; every later item of it is a target too.
        valid: histories of the valid windows. valid_targets: int64[V].
    """

    num_items: int
    max_history: int
    items: np.ndarray
    begins: np.ndarray
    first: np.ndarray
    valid: Histories
    valid_targets: np.ndarray

    def targets(self) -> np.ndarray:
        """The targets of an epoch, int64."""
        length = np.diff(self.begins)
        place = np.arange(len(self.items)) - np.repeat(self.begins[:-1], length)
        return self.items[place >= np.repeat(self.first, length)]

    def segments(self, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The segments of one epoch in random order; where they begin differs from epoch to epoch.

        Returns:
            ids int64[S, T] and targets int64[S, T], `NO_TARGET` where a slot has none.
        """
        rng = np.random.default_rng(seed)
        length = np.diff(self.begins)
        shift = rng.integers(0, self.max_history, len(length))
        num_segments = -(-(length - self.first + shift) // self.max_history)
        run = np.repeat(np.arange(len(length)), num_segments)
        number = np.arange(len(run)) - np.repeat(np.cumsum(num_segments) - num_segments, num_segments)
        start = self.first[run] - shift[run] + number * self.max_history
        stop = np.minimum(start + self.max_history, length[run])
        start = np.maximum(start, self.first[run])
        # The last target of a segment has the longest history that fits. Every target has at least one item
        # before it where its window has, because there are no more targets than items fit.
        oldest = np.maximum(0, stop - 1 - self.max_history)
        # Slot t holds the item before place[:, t], and that item is its target.
        place = oldest[:, None] + np.arange(self.max_history + 1)
        at = np.minimum(self.begins[run][:, None] + place, len(self.items) - 1)
        is_target = (place >= start[:, None]) & (place < stop[:, None])
        targets = np.where(is_target, self.items[at], NO_TARGET)
        ids = np.full_like(targets, self.num_items)
        ids[:, 1:] = np.where(place[:, 1:] < stop[:, None], self.items[at[:, :-1]], self.num_items)
        order = rng.permutation(len(run))
        return ids[order], targets[order]

    def digest(self) -> str:
        """SHA-256 of everything here."""
        found = hashlib.sha256(f"{self.num_items} {self.max_history}".encode())
        for array in (
            self.items,
            self.begins,
            self.first,
            self.valid.ids,
            self.valid.last,
            self.valid_targets,
        ):
            found.update(np.ascontiguousarray(array, dtype=np.int64).tobytes() + b"|")
        return found.hexdigest()


def histories_of(histories: Sequence[Sequence[int]], max_history: int, start_token: int) -> Histories:
    """Histories of catalogue entries, oldest first, cut to their newest `max_history` items."""
    ids = np.full((len(histories), max_history + 1), start_token, dtype=np.int64)
    last = np.zeros(len(histories), dtype=np.int64)
    for row, history in enumerate(histories):
        newest = list(history)[-max_history:]
        ids[row, 1 : len(newest) + 1] = newest
        last[row] = len(newest)
    return Histories(ids, last)


def sequences_of(corpus: Corpus, catalogue: Catalogue, seed: int = 0) -> Sequences:
    """The train and valid windows of a corpus. The test split is never looked at."""
    index_of = catalogue.index_of

    def entries(samples: list[Sample]) -> list[Sample]:
        """Windows whose ids are catalogue entries; items that the catalogue does not have are left out."""
        return [
            replace(
                s, history=tuple(index_of[i] for i in s.history if i in index_of), target=index_of[s.target]
            )
            for s in samples
            if s.target in index_of
        ]

    train = entries(corpus.splits["train"])
    valid = entries(corpus.splits["valid"])
    if len(valid) > MAX_VALID:
        chosen = np.random.default_rng([seed, 1]).choice(len(valid), size=MAX_VALID, replace=False)
        valid = [valid[i] for i in sorted(chosen.tolist())]
    runs = stitch(train, 1, 1, 0).runs
    max_history = max(1, max(len(s.history) for s in train))
    return Sequences(
        len(catalogue),
        max_history,
        np.array([item for run in runs for item in run.items], dtype=np.int64),
        np.cumsum([0, *(len(run.items) for run in runs)]),
        np.array([run.first for run in runs], dtype=np.int64),
        histories_of([s.history for s in valid], max_history, len(catalogue)),
        np.array([s.target for s in valid], dtype=np.int64),
    )
