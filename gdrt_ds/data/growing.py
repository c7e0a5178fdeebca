"""Windows that grow from a common start, so that the samples of a block share their history.

Sliding windows give every target the items before it, up to `data.history_length`. Two neighbouring
windows of a user hold nearly the same items, but they begin at different ones, so no token of their
histories can be shared. Growing windows cut the targets of a user into blocks. All histories of a block
begin at the same item:

    items            a b c d e f g
    sliding, 3       abc -> d    bcd -> e    cde -> f    def -> g
    growing, 3       a -> b      ab -> c     abc -> d    d -> e      de -> f     def -> g

`train.packing=prefix_tree` then computes the shared items once. The targets are exactly those of the train
windows, once in an epoch. Their histories are shorter on average. Where the blocks begin moves from epoch to
epoch, so that no target always has the short history.

Histories are only ever cut from what the data say that came before: consecutive windows of a user are
stitched where the history of one continues the other. A window that continues nothing starts a run of
its own.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import Sample
from gdrt_ds.data.prompts import PromptEncoder, TokenStore
from gdrt_ds.data.window_store import WindowStore


@dataclass(frozen=True)
class Run:
    """Consecutive items of one user.

    Attributes:
        items: oldest first.
        first: place of the first target among them; every item from there on is the target of one sample.
    """

    items: tuple[str, ...]
    first: int


@dataclass(frozen=True)
class GrowingWindows:
    """Which items each sample's history holds in each epoch.

    Attributes:
        runs: the users' items.
        run_of: int64[n], the run of each sample.
        place_of: int64[n], where each sample's target stands in its run.
        block: targets of a block, at most.
        min_history: items that open a block as history only.
        seed: of the order and of the starts.
    """

    runs: tuple[Run, ...]
    run_of: np.ndarray
    place_of: np.ndarray
    block: int
    min_history: int
    seed: int

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample: the number of its block in its run, and the place of the block's first target."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch, 1]))
        offset = generator.integers(0, self.block, len(self.runs))[self.run_of]
        first = np.array([run.first for run in self.runs], dtype=np.int64)[self.run_of]
        number = (self.place_of - first + offset) // self.block
        return number, first + np.maximum(0, number * self.block - offset)

    def starts(self, epoch: int) -> np.ndarray:
        """Returns int64[n]: the place of the oldest item of each sample's history."""
        _, first_target = self._blocks(epoch)
        return np.maximum(0, first_target - self.min_history)

    def order(self, epoch: int) -> np.ndarray:
        """Returns int64[n]: all samples, a block behind the other, the blocks in a random order."""
        number, _ = self._blocks(epoch)
        widest = int(number.max()) + 1
        key = self.run_of * widest + number
        _, block_of = np.unique(key, return_inverse=True)
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch, 2]))
        rank = generator.permutation(int(block_of.max()) + 1)
        return np.lexsort((self.place_of, rank[block_of]))

    def history(self, sample: int, start: int) -> tuple[str, ...]:
        """Returns the items from `start` to the sample's target, without it."""
        return self.runs[self.run_of[sample]].items[start : self.place_of[sample]]


def stitch(samples: Sequence[Sample], block: int, min_history: int, seed: int) -> GrowingWindows:
    """Returns the growing windows that have exactly these samples as targets.

    Args:
        samples: the train windows; each user's are taken in time order.
        block, min_history, seed: see `GrowingWindows`.
    """
    runs: list[Run] = []
    run_of = np.zeros(len(samples), dtype=np.int64)
    place_of = np.zeros(len(samples), dtype=np.int64)
    of_user: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        of_user[sample.user_id].append(index)
    for members in of_user.values():
        if all(samples[index].timestamp is not None for index in members):
            members.sort(key=lambda index: samples[index].timestamp)  # stable: ties keep their order
        items: list[str] = []
        first = 0
        for index in members:
            history = samples[index].history
            if not _continues(items, history):
                if items:
                    runs.append(Run(tuple(items), first))
                items = list(history)
                first = len(items)
            run_of[index] = len(runs)
            place_of[index] = len(items)
            items.append(samples[index].target)
        runs.append(Run(tuple(items), first))
    return GrowingWindows(tuple(runs), run_of, place_of, block, min_history, seed)


def _continues(items: list[str], history: tuple[str, ...]) -> bool:
    """Whether a window stands right behind the items of a run: its history is their end."""
    if not items or not history or len(history) > len(items):
        return False
    return items[len(items) - len(history) :] == list(history)


class GrowingStore(TokenStore):
    """A train split whose prompts depend on the epoch.

    A row is named `epoch * n + sample`. Targets, their tokens and all facts about them are those of the
    sample; the prompt before them is encoded when it is asked for.

    The arrays of the base class are those of the sliding windows: their lengths and offsets hold for
    targets only.
    """

    def __init__(
        self, sliding: WindowStore, windows: GrowingWindows, encoder: PromptEncoder, catalogue: Catalogue
    ):
        """Args: sliding: the split, tokenised with sliding windows."""
        self.sliding = sliding
        self.windows = windows
        self.encoder = encoder
        self.catalogue = catalogue
        self.num_target = sliding.num_target
        self.target_offsets = sliding.target_offsets
        self._starts: dict[int, np.ndarray] = {}
        self._orders: dict[int, np.ndarray] = {}

    @property
    def input_ids(self) -> np.ndarray:
        return self.sliding.input_ids

    @property
    def segments(self) -> np.ndarray:
        return self.sliding.segments

    @property
    def offsets(self) -> np.ndarray:
        return self.sliding.offsets

    @property
    def lengths(self) -> np.ndarray:
        return self.sliding.lengths

    def order(self, epoch: int) -> np.ndarray:
        """Returns int64[n]: the rows of an epoch in the order in which training takes them."""
        return _kept(self._orders, epoch, lambda number: self.windows.order(number) + number * len(self))

    def sample_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the samples that rows belong to."""
        return np.asarray(rows) % len(self)

    def row(self, sample: int) -> np.ndarray:
        """Tokens of one row, its target included, int32[T]."""
        epoch, index = divmod(int(sample), len(self))
        start = int(self._starts_of(epoch)[index])
        titles = [self.catalogue.text_of(item) for item in self.windows.history(index, start)]
        target = self.catalogue.entries[self.sliding.windows.targets[index]].text
        return self.encoder.encode(titles, target).input_ids

    def _starts_of(self, epoch: int) -> np.ndarray:
        return _kept(self._starts, epoch, self.windows.starts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the sliding windows and of what makes these of them."""
        windows = self.windows
        text = f"{self.sliding.fingerprint} growing {windows.block} {windows.min_history} {windows.seed}"
        return hashlib.sha256(text.encode()).hexdigest()


def _kept(kept: dict[int, np.ndarray], epoch: int, make: Callable[[int], np.ndarray]) -> np.ndarray:
    """Returns `make(epoch)`, which the steps of an epoch share; a step at the turn of an epoch needs two."""
    if epoch not in kept:
        while len(kept) > 1:
            del kept[min(kept)]
        kept[epoch] = make(epoch)
    return kept[epoch]
