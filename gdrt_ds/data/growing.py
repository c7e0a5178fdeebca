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
its own. A history that is shorter than the longest of the data begins at the user's first item, so it
continues a run only if it is the whole run. Otherwise a short one could equal a run's end by chance.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.coded_windows import entries_of
from gdrt_ds.data.columns import WindowTable
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


@dataclass(frozen=True, eq=False)
class Runs(Sequence[Run]):
    """All runs, as stretches of one array of items.

    Attributes:
        items: integers, numbers of items in `names`.
        names: item ids by number.
        starts, stops: int64[runs], where each run's items are.
        first: int64[runs], see `Run`.
    """

    items: np.ndarray
    names: Sequence[str]
    starts: np.ndarray
    stops: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Runs:
        """Returns runs that are a list."""
        number: dict[str, int] = {}
        items = [number.setdefault(item, len(number)) for run in runs for item in run.items]
        stops = np.cumsum([len(run.items) for run in runs])
        first = np.array([run.first for run in runs], dtype=np.int64)
        starts = np.concatenate([[0], stops[:-1]])
        return cls(np.array(items, dtype=np.int32), list(number), starts, stops, first)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index):
        items = self.items[self.starts[index] : self.stops[index]]
        return Run(self.named(items), int(self.first[index]))

    def named(self, items: np.ndarray) -> tuple[str, ...]:
        """The ids of numbered items."""
        return tuple(self.names[item] for item in items.tolist())


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

    runs: Runs
    run_of: np.ndarray
    place_of: np.ndarray
    block: int
    min_history: int
    seed: int

    def _blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample: the number of its block in its run, and the place of the block's first target."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch, 1]))
        offset = generator.integers(0, self.block, len(self.runs))[self.run_of]
        first = self.runs.first[self.run_of]
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

    def targets(self) -> np.ndarray:
        """Returns int64[n]: where each sample's target stands in `runs.items`.

        Raises:
            RuntimeError: the samples are not the targets of the runs, each once. That is a bug of ours.
        """
        count = len(self.place_of)
        of_run = self.runs.stops - self.runs.starts - self.runs.first
        place = self.place_of - self.runs.first[self.run_of]
        problem = None
        if of_run.sum() != count:
            problem = f"the runs have {of_run.sum():,} targets, there are {count:,} samples"
        elif ((place < 0) | (place >= of_run[self.run_of])).any():
            problem = "a sample's target is none of the targets of its run"
        else:
            times = np.bincount((np.cumsum(of_run) - of_run)[self.run_of] + place, minlength=count)
            if (times != 1).any():
                problem = f"{int((times > 1).sum()):,} targets are there more than once"
        if problem is not None:
            raise _not_the_train_windows(problem)
        return self.runs.starts[self.run_of] + self.place_of

    def history(self, sample: int, start: int) -> tuple[str, ...]:
        """Returns the items from `start` to the sample's target, without it."""
        begin = self.runs.starts[self.run_of[sample]]
        return self.runs.named(self.runs.items[begin + start : begin + self.place_of[sample]])


def stitch(samples: Sequence[Sample], block: int, min_history: int, seed: int) -> GrowingWindows:
    """Returns the growing windows that have exactly these samples as targets.

    Args:
        samples: the train windows; each user's are taken in time order.
        block, min_history, seed: see `GrowingWindows`.
    """
    found = None
    if isinstance(samples, WindowTable):
        found = _runs_of_log(samples)
    if found is None:
        found = _runs_of(samples)
    return GrowingWindows(*found, block, min_history, seed)


def _runs_of(samples: Sequence[Sample]) -> tuple[Runs, np.ndarray, np.ndarray]:
    """(runs, the run of each sample, the place of its target), from any windows, one after the other."""
    runs: list[Run] = []
    run_of = np.zeros(len(samples), dtype=np.int64)
    place_of = np.zeros(len(samples), dtype=np.int64)
    of_user: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        of_user[sample.user_id].append(index)
    longest = max((len(sample.history) for sample in samples), default=0)
    for members in of_user.values():
        if all(samples[index].timestamp is not None for index in members):
            members.sort(key=lambda index: samples[index].timestamp)  # stable: ties keep their order
        items: list[str] = []
        first = 0
        for index in members:
            history = samples[index].history
            if not _continues(items, history, longest):
                if items:
                    runs.append(Run(tuple(items), first))
                items = list(history)
                first = len(items)
            run_of[index] = len(runs)
            place_of[index] = len(items)
            items.append(samples[index].target)
        runs.append(Run(tuple(items), first))
    return Runs.of(runs), run_of, place_of


def _runs_of_log(samples: WindowTable) -> tuple[Runs, np.ndarray, np.ndarray] | None:
    """The same from windows over a log: a run is a stretch of events whose windows are all there.

    None where a window continues a run behind a gap, because its items are those at the end of the run by
    chance. Only the comparison of items decides that, so all windows are then stitched one by one.
    """
    events = samples.events
    order = np.argsort(samples.ends, kind="stable")  # a user's windows together, in time order
    ends = samples.ends[order].astype(np.int64)
    lengths = samples.lengths[order].astype(np.int64)
    users = events.users[ends]
    is_new_user = np.concatenate([[True], users[1:] != users[:-1]])
    opens = is_new_user | np.concatenate([[True], ends[1:] != ends[:-1] + 1])
    run = np.cumsum(opens) - 1
    first = np.flatnonzero(opens)
    starts = (ends - lengths)[first]
    if _continues_by_chance(events.items, ends, lengths, starts[run], np.flatnonzero(opens & ~is_new_user)):
        return None
    # Runs are numbered in the order in which their users come in the split.
    user_of_run = np.cumsum(is_new_user)[first] - 1
    numbered = np.argsort(order[np.flatnonzero(is_new_user)][user_of_run], kind="stable")
    number = np.empty(len(first), dtype=np.int64)
    number[numbered] = np.arange(len(first))
    run_of = np.empty(len(ends), dtype=np.int64)
    place_of = np.empty(len(ends), dtype=np.int64)
    run_of[order] = number[run]
    place_of[order] = ends - starts[run]
    stops = ends[np.append(first[1:], len(ends)) - 1] + 1
    columns = (starts[numbered], stops[numbered], lengths[first][numbered])
    return Runs(events.items, events.item_ids, *columns), run_of, place_of


def _continues_by_chance(
    items: np.ndarray, ends: np.ndarray, lengths: np.ndarray, start: np.ndarray, behind_gap: np.ndarray
) -> bool:
    """Whether the history of a window behind a gap is equal to the end of the run before the gap.

    Args:
        start: the first event of each window's run.
        behind_gap: windows that follow a gap.
    """
    last = ends[behind_gap - 1]
    alive = lengths[behind_gap] <= last + 1 - start[behind_gap - 1]
    window, last = behind_gap[alive], last[alive]
    for back in range(int(lengths.max(initial=0))):
        compared = back < lengths[window]
        same = items[last - back * compared] == items[ends[window] - 1 - back * compared]
        window, last = window[same | ~compared], last[same | ~compared]
    return bool(len(window))


def _continues(items: list[str], history: tuple[str, ...], longest: int) -> bool:
    """Whether a window stands right behind the items of a run: its history is their end.

    Args:
        longest: items of a whole window; a shorter history begins at the user's first item.
    """
    if not items or not history or len(history) > len(items):
        return False
    if len(history) < longest and len(history) < len(items):
        return False
    return items[len(items) - len(history) :] == list(history)


class GrowingStore(TokenStore):
    """A train split whose prompts depend on the epoch.

    A row is named `epoch * n + sample`. Targets, their tokens and all facts about them are those of the
    sample; the prompt before them is encoded when it is asked for.

    So one sample has no one length, and the arrays that lay all rows out one behind the other do not exist:
    `input_ids`, `segments`, `offsets` and `lengths` raise. `row` gives the tokens of one row.
    """

    def __init__(
        self, sliding: WindowStore, windows: GrowingWindows, encoder: PromptEncoder, catalogue: Catalogue
    ):
        """Args: sliding: the split, tokenised with sliding windows.

        Raises:
            RuntimeError: the growing windows have other targets than the sliding ones. That is a bug of ours.
        """
        _check_targets(windows, sliding.windows.targets, catalogue)
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
        raise _no_array("input_ids")

    @property
    def segments(self) -> np.ndarray:
        raise _no_array("segments")

    @property
    def offsets(self) -> np.ndarray:
        raise _no_array("offsets")

    @property
    def lengths(self) -> np.ndarray:
        raise _no_array("lengths")

    @property
    def rows_change(self) -> bool:
        """The blocks of every epoch begin at other items."""
        return True

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


def _no_array(name: str) -> RuntimeError:
    """Says why there is no such array. Those of the sliding windows would be arrays of other histories."""
    return RuntimeError(
        f"growing windows have no array {name!r}: a sample has another row in every epoch. Use row()."
    )


def _check_targets(windows: GrowingWindows, entries: np.ndarray, catalogue: Catalogue) -> None:
    """Raises RuntimeError unless the growing windows have exactly these targets, in this order.

    A target's tokens and group come from the sliding windows, its history from the growing ones. If the two
    did not fit, the model would be trained on wrong histories, and no loss would show it.

    Args:
        entries: int32[n], the catalogue entry of each train window's target.
    """
    if len(windows.place_of) != len(entries):
        raise _not_the_train_windows(f"{len(windows.place_of):,} targets, {len(entries):,} train windows")
    items = windows.runs.items[windows.targets()]
    others = entries_of(windows.runs.names, catalogue)[items] != entries
    if others.any():
        first = int(np.argmax(others))
        raise _not_the_train_windows(
            f"{int(others.sum()):,} samples have another target, the first is sample {first}: "
            f"item {windows.runs.names[int(items[first])]} for {catalogue.entries[entries[first]].item_id}"
        )


def _not_the_train_windows(problem: str) -> RuntimeError:
    return RuntimeError(
        f"the targets of growing windows are not exactly the train windows: {problem}; this is a bug of "
        "gdrt_ds, please report it; data.windows=sliding trains on the windows as they are"
    )


def _kept(kept: dict[int, np.ndarray], epoch: int, make: Callable[[int], np.ndarray]) -> np.ndarray:
    """Returns `make(epoch)`, which the steps of an epoch share; a step at the turn of an epoch needs two."""
    if epoch not in kept:
        while len(kept) > 1:
            del kept[min(kept)]
        kept[epoch] = make(epoch)
    return kept[epoch]
