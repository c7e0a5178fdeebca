"""From interactions to windows: rating filter, k-core, sliding windows, and the split in time.

The split is at two points of global time, or leaves each user's last items out. Everything is deterministic:
events of equal time keep the order of the file. `corpus.load_corpus` calls it. All steps work on columns; the
same steps on Python objects, one event after the other, are the reference of the tests
(tests/data/reference_windows.py).

Shapes: R rows of the log, E events that are left.
"""

from __future__ import annotations

import numpy as np

from gdrt_ds.config import DataSection
from gdrt_ds.data.columns import EventTable, WindowTable
from gdrt_ds.data.readers.base import RATINGS_UNUSED, InteractionColumns, Interactions, Windows
from gdrt_ds.errors import UserError


def make_windows(found: Interactions | InteractionColumns, data: DataSection) -> tuple[Windows, list[str]]:
    """Makes the windows of every split, and notes that account for every event left out.

    An event becomes a target when its user has at least `min_history` events before it. Its history
    is the newest `history_length` of them.

    Raises:
        UserError: no interaction is left.
    """
    log = found
    if isinstance(found, Interactions):
        log = InteractionColumns.of(found)
    notes = list(log.notes)
    keep = _filtered(log, data, notes)
    if log.times is None:
        notes.append("the interactions carry no timestamp: the order of the file stands for time")
    else:
        keep = keep[np.argsort(log.times[keep], kind="stable")]  # ties keep the order of the file
    by_user = np.argsort(log.users_of[keep], kind="stable")
    events = _events(log, keep[by_user])
    first, last = _bounds_of_users(events.users)
    if events.times is not None:
        notes += _tie_note(events)
        notes += _repeat_note(events)
    num_users = int((first == np.arange(len(first))).sum())

    # From here on everything is in the order of time.
    place = np.empty(len(keep), dtype=np.int32)
    place[by_user] = np.arange(len(keep), dtype=np.int32)
    before = place - first[place]
    is_target = before >= data.min_history
    place = place[is_target]
    lengths = np.minimum(before[is_target], data.history_length)
    lengths = lengths.astype(np.min_scalar_type(min(data.history_length, 2**31 - 1)))
    windows = WindowTable(events, place, lengths)
    notes.append(
        f"{len(windows)} windows from {len(keep)} interactions of {num_users} users; "
        f"{len(keep) - len(windows)} interactions have fewer than "
        f"data.min_history={data.min_history} before them and are history only"
    )
    items = _used_items(log, events, notes)
    users = {}
    if log.users:
        numbers = np.unique(events.users).tolist()
        there = {log.user_names[number] for number in numbers}
        users = {user: attributes for user, attributes in log.users.items() if user in there}
    splits = _split(windows, last[place] - place, data)
    return Windows(splits, items, users, log.domain), notes


def _filtered(log: InteractionColumns, data: DataSection, notes: list[str]) -> np.ndarray:
    """int64[E]: rows that pass the rating filter and the k-core, in file order."""
    keep = np.arange(len(log.users_of))
    if data.min_rating is not None and log.ratings is not None:
        kept = np.flatnonzero(log.ratings >= data.min_rating)
        notes.append(
            f"{len(keep) - len(kept)} of {len(keep)} interactions are rated below "
            f"data.min_rating={data.min_rating:g} and left out"
        )
        keep = kept
    elif log.ratings is not None:
        notes.append(RATINGS_UNUSED)
    if data.kcore > 1:
        kept = k_core(log.users_of, log.items_of, keep, data.kcore)
        notes.append(
            f"{len(keep) - len(kept)} of {len(keep)} interactions are outside the {data.kcore}-core and "
            "left out"
        )
        keep = kept
    if not len(keep):
        raise UserError(
            f"data.path={data.path}: no interaction is left (data.min_rating={data.min_rating}, "
            f"data.kcore={data.kcore})",
            "lower data.kcore or data.min_rating, or check the interactions file",
        )
    return keep


def _events(log: InteractionColumns, rows: np.ndarray) -> EventTable:
    times = None if log.times is None else log.times[rows]
    return EventTable(log.users_of[rows], log.items_of[rows], times, log.user_names, list(log.items))


def _bounds_of_users(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int32[E], int32[E]): the first and the last event of each event's user; users stand together."""
    starts = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
    sizes = np.diff(np.append(starts, len(users)))
    first = np.repeat(starts.astype(np.int32), sizes)
    last = np.repeat((starts + sizes - 1).astype(np.int32), sizes)
    return first, last


def _tie_note(events: EventTable) -> list[str]:
    same_user = events.users[1:] == events.users[:-1]
    tied = int((same_user & (events.times[1:] == events.times[:-1])).sum())
    if not tied:
        return []
    return [
        f"{tied} of {int(same_user.sum())} neighbouring interactions of a user share their timestamp; they "
        "keep the order of the file"
    ]


def _repeat_note(events: EventTable) -> list[str]:
    """Counts the rows that repeat a user, an item and a time.

    Such rows mostly come from an export that was joined twice. Each makes a window whose target may stand in
    its own history, so that whoever repeats the last item looks good.
    """
    tied = (events.users[1:] == events.users[:-1]) & (events.times[1:] == events.times[:-1])
    ends = np.flatnonzero(tied)
    rows = np.union1d(ends, ends + 1)  # few of a large log
    rows = rows[np.lexsort((events.items[rows], events.times[rows], events.users[rows]))]
    columns = (events.users[rows], events.times[rows], events.items[rows])
    repeats = int(np.logical_and.reduce([column[1:] == column[:-1] for column in columns]).sum())
    if not repeats:
        return []
    return [
        f"{repeats} of {len(events.users)} interactions repeat another one: the same user, item and time. "
        "Their targets stand in their own histories; if the file holds lines twice, leave the second ones out"
    ]


def _used_items(log: InteractionColumns, events: EventTable, notes: list[str]) -> dict:
    """The items of events that are left, in the order of the item table."""
    used = np.bincount(events.items, minlength=len(log.items)) > 0
    items = {item: record for (item, record), there in zip(log.items.items(), used.tolist()) if there}
    if len(items) < len(log.items):
        notes.append(
            f"{len(log.items) - len(items)} of {len(log.items)} items of the item table are in no "
            "interaction that is left "
            "and are not in the catalogue"
        )
    return items


def _split(windows: WindowTable, later: np.ndarray, data: DataSection) -> dict[str, WindowTable]:
    """Deals windows out, which come in time order.

    Args:
        later: int32[n], events of the same user behind each window's target.
    """
    if data.split == "leave_one_out":
        return {
            "train": windows.take(later > 1),
            "valid": windows.take(later == 1),
            "test": windows.take(later == 0),
        }
    first, second = time_cuts(len(windows), data.split_ratio)
    return {
        "train": windows.take(slice(0, first)),
        "valid": windows.take(slice(first, second)),
        "test": windows.take(slice(second, None)),
    }


def time_cuts(num_windows: int, ratio: tuple[float, float, float]) -> tuple[int, int]:
    """Returns where train ends and where valid ends, counted in windows; shares need not sum to 1."""
    total = sum(ratio)
    if min(ratio) < 0 or total <= 0 or ratio[0] == 0:
        raise UserError(
            f"data.split_ratio={list(ratio)}: shares must not be negative and train needs one",
            "for example [0.8, 0.1, 0.1]",
        )
    return round(num_windows * ratio[0] / total), round(num_windows * (ratio[0] + ratio[1]) / total)


def k_core(users_of: np.ndarray, items_of: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """Returns the rows that are left when users and items with fewer than k rows are dropped until none is.

    The order of the rows is kept.

    Args:
        users_of, items_of: int32[R].
        rows: int64, the rows to look at.
    """
    while True:
        users, items = users_of[rows], items_of[rows]
        enough = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k)
        if enough.all():
            return rows
        rows = rows[enough]
