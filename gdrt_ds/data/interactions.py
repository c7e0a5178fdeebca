"""From interactions to windows: rating filter, k-core, sliding windows, and the split in time.

The split is at two points of global time, or leaves each user's last items out. Everything is deterministic:
events of equal time keep the order of the file. `corpus.load_corpus` calls it.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from gdrt_ds.config import DataSection
from gdrt_ds.data.readers.base import RATINGS_UNUSED, Interactions, Sample, Windows
from gdrt_ds.errors import UserError


def make_windows(events: Interactions, data: DataSection) -> tuple[Windows, list[str]]:
    """Makes the windows of every split, and notes that account for every event left out.

    An event becomes a target when its user has at least `min_history` events before it. Its history
    is the newest `history_length` of them.
    """
    notes = list(events.notes)
    keep = list(range(len(events.users_of)))
    if data.min_rating is not None and events.ratings is not None:
        kept = [row for row in keep if events.ratings[row] >= data.min_rating]
        notes.append(
            f"{len(keep) - len(kept)} of {len(keep)} interactions are rated below "
            f"data.min_rating={data.min_rating:g} and left out"
        )
        keep = kept
    elif events.ratings is not None:
        notes.append(RATINGS_UNUSED)
    if data.kcore > 1:
        kept = k_core(events.users_of, events.items_of, keep, data.kcore)
        notes.append(
            f"{len(keep) - len(kept)} of {len(keep)} interactions are outside the {data.kcore}-core and "
            "left out"
        )
        keep = kept
    if not keep:
        raise UserError(
            f"data.path={data.path}: no interaction is left (data.min_rating={data.min_rating}, "
            f"data.kcore={data.kcore})",
            "lower data.kcore or data.min_rating, or check the interactions file",
        )
    timestamps = events.timestamps
    if timestamps is None:
        notes.append("the interactions carry no timestamp: the order of the file stands for time")
    else:
        keep.sort(key=timestamps.__getitem__)  # stable: ties keep the order of the file
    of_user: dict[str, list[int]] = defaultdict(list)
    for row in keep:
        of_user[events.users_of[row]].append(row)
    if timestamps is not None:
        tied = sum(
            timestamps[a] == timestamps[b] for rows in of_user.values() for a, b in zip(rows, rows[1:])
        )
        pairs = sum(len(rows) - 1 for rows in of_user.values())
        if tied:
            notes.append(
                f"{tied} of {pairs} neighbouring interactions of a user share their timestamp; they keep "
                "the order of the file"
            )
    place: dict[int, tuple[str, int]] = {
        row: (user, k) for user, rows in of_user.items() for k, row in enumerate(rows)
    }
    # In time order, with the number of later events of the same user.
    windows: list[tuple[Sample, int]] = []
    for row in keep:
        user, k = place[row]
        if k < data.min_history:
            continue
        rows = of_user[user]
        history = tuple(events.items_of[r] for r in rows[max(0, k - data.history_length) : k])
        time = None if timestamps is None else timestamps[row]
        sample = Sample(0, user, history, events.items_of[row], time)
        windows.append((sample, len(rows) - 1 - k))
    short = len(keep) - len(windows)
    notes.append(
        f"{len(windows)} windows from {len(keep)} interactions of {len(of_user)} users; {short} "
        "interactions have fewer than "
        f"data.min_history={data.min_history} before them and are history only"
    )
    used = set(events.items_of[row] for row in keep)
    items = {item: record for item, record in events.items.items() if item in used}
    if len(items) < len(events.items):
        notes.append(
            f"{len(events.items) - len(items)} of {len(events.items)} items of the item table are in no "
            "interaction that is left "
            "and are not in the catalogue"
        )
    users = {user: attributes for user, attributes in events.users.items() if user in of_user}
    return Windows(_split(windows, data), items, users, events.domain), notes


def _split(windows: list[tuple[Sample, int]], data: DataSection) -> dict[str, list[Sample]]:
    """Deals windows out, which come in time order with the number of later events of the same user."""
    if data.split == "leave_one_out":
        return {
            "train": [sample for sample, later in windows if later > 1],
            "valid": [sample for sample, later in windows if later == 1],
            "test": [sample for sample, later in windows if later == 0],
        }
    samples = [sample for sample, _ in windows]
    first, second = time_cuts(len(samples), data.split_ratio)
    return {"train": samples[:first], "valid": samples[first:second], "test": samples[second:]}


def time_cuts(num_windows: int, ratio: tuple[float, float, float]) -> tuple[int, int]:
    """Returns where train ends and where valid ends, counted in windows; shares need not sum to 1."""
    total = sum(ratio)
    if min(ratio) < 0 or total <= 0 or ratio[0] == 0:
        raise UserError(
            f"data.split_ratio={list(ratio)}: shares must not be negative and train needs one",
            "for example [0.8, 0.1, 0.1]",
        )
    return round(num_windows * ratio[0] / total), round(num_windows * (ratio[0] + ratio[1]) / total)


def k_core(users_of: list[str], items_of: list[str], rows: list[int], k: int) -> list[int]:
    """Returns the rows that are left when users and items with fewer than k rows are dropped until none is.

    The order of the rows is kept.
    """
    while True:
        num_of_user = Counter(users_of[row] for row in rows)
        num_of_item = Counter(items_of[row] for row in rows)
        kept = [row for row in rows if num_of_user[users_of[row]] >= k and num_of_item[items_of[row]] >= k]
        if len(kept) == len(rows):
            return kept
        rows = kept
