"""The reference of the columns: windows, splits, popularity and fingerprint from one Python object per event.

This is how gdrt_ds/data/interactions.py and corpus.py computed before they worked on columns. It is slow and
plain and stays here, because the columns must give the same to the letter (test_columns.py).
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np

from gdrt_ds.config import DataSection
from gdrt_ds.data.corpus import SPLITS, Corpus
from gdrt_ds.data.interactions import time_cuts
from gdrt_ds.data.popularity import count_items
from gdrt_ds.data.readers.base import RATINGS_UNUSED, Interactions, Sample, Windows
from gdrt_ds.errors import UserError


def reference_corpus(events: Interactions, data: DataSection) -> Corpus:
    """Windows in three splits, with notes and fingerprint, as `load_corpus` makes them of interactions."""
    windows, notes = make_windows(events, data)
    splits = _finish_splits(windows, data, notes)
    notes += _trained_on(splits)
    corpus = Corpus("log", windows.domain, windows.items, splits, windows.users, notes)
    corpus.fingerprint = _fingerprint(corpus)
    return corpus


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
        triples = Counter((events.users_of[row], events.items_of[row], timestamps[row]) for row in keep)
        repeats = len(keep) - len(triples)
        if repeats:
            notes.append(
                f"{repeats} of {len(keep)} interactions repeat another one: the same user, item and time. "
                "Their targets stand in their own histories; if the file holds lines twice, leave the second "
                "ones out"
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


def _finish_splits(windows: Windows, data: DataSection, notes: list[str]) -> dict[str, list[Sample]]:
    """Cuts histories, drops short ones, carves valid where the files have none, samples and numbers.

    Everything that leaves windows out is noted.
    """
    splits = {}
    for name, samples in windows.splits.items():
        kept = [replace(s, history=s.history[-data.history_length :]) for s in samples]
        long_enough = [s for s in kept if len(s.history) >= data.min_history]
        if len(long_enough) < len(kept):
            notes.append(
                f"{name}: {len(kept) - len(long_enough)} of {len(kept)} windows have fewer than "
                f"data.min_history={data.min_history} "
                "history items and are left out"
            )
        splits[name] = long_enough
    for index, name in enumerate(SPLITS):
        limit = getattr(data, f"limit_{name}")
        samples = splits[name]
        if limit is not None and limit < len(samples):
            chosen = np.random.default_rng([data.sample_seed, index]).choice(
                len(samples), size=limit, replace=False
            )
            notes.append(
                f"{name}: a seeded sample of {limit} of {len(samples)} windows (data.limit_{name}, "
                f"data.sample_seed={data.sample_seed})"
            )
            samples = [samples[i] for i in sorted(chosen.tolist())]
        splits[name] = [replace(sample, sample_id=i) for i, sample in enumerate(samples)]
    return {name: splits[name] for name in SPLITS}


def _trained_on(splits: dict[str, list[Sample]]) -> list[str]:
    """A line for every held-out split that shares windows with train."""

    def window(sample: Sample) -> tuple:
        return sample.user_id, sample.history, sample.target, sample.timestamp

    held_out = {window(sample) for name in ("valid", "test") for sample in splits[name]}
    train = {key for key in map(window, splits["train"]) if key in held_out}
    lines = []
    for name in ("valid", "test"):
        shared = sum(window(sample) in train for sample in splits[name])
        if shared:
            lines.append(
                f"{name}: {shared} of {len(splits[name])} windows are also windows of train (same user, "
                "history, target and time): their targets are trained on"
            )
    return lines


def train_popularity(corpus: Corpus) -> Counter[str]:
    """Counts the interactions per item in train from samples, whose windows are stitched user by user."""
    return count_items(list(corpus.splits["train"]))


def _fingerprint(corpus: Corpus) -> str:
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass") + b"\x1e")

    add(corpus.domain)
    for item in corpus.items.values():
        add("item", item.item_id, item.title, item.provider, *item.genres)
    for user, attributes in sorted(corpus.users.items()):
        add("user", user, *(f"{k}={v}" for k, v in sorted(attributes.items())))
    for name in SPLITS:
        for s in corpus.splits[name]:
            add(
                name,
                s.user_id,
                s.timestamp,
                *s.history,
                s.target,
                *(f"{k}={v}" for k, v in sorted(s.labels.items())),
            )
    return digest.hexdigest()
