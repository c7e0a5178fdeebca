"""The corpus: items with titles and providers, users with attributes, and windows in three splits.

A window is a history and the target that follows it. `load_corpus(data)` reads any supported source: an
embedded set (`planted`, `ml-100k`), ready-made windows, plain tables, MovieLens or Amazon reviews. Nothing is
dropped silently: `Corpus.notes` accounts for every row that is not used.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gdrt_ds.config import DataSection
from gdrt_ds.data.columns import WindowTable
from gdrt_ds.data.interactions import make_windows
from gdrt_ds.data.log_cache import kept_log
from gdrt_ds.data.popularity import count_items
from gdrt_ds.data.readers._hub import on_this_machine
from gdrt_ds.data.readers.base import BadRows, InteractionColumns, Interactions, Item, Reader, Sample, Windows
from gdrt_ds.data.unused import unused_by_reader, unused_for_log, unused_for_windows
from gdrt_ds.data.window_facts import add_record, add_windows, also_in_train
from gdrt_ds.errors import UserError, nearest
from gdrt_ds.registry import parts

__all__ = ["Corpus", "Item", "Sample", "load_corpus", "train_popularity"]

SPLITS = ("train", "valid", "test")
READERS = "gdrt_ds.data.readers"


@dataclass
class Corpus:
    """Items, users and the windows of each split.

    Attributes:
        name: of the data set.
        domain: what an item is called in a prompt ("movie", "book", "product", "item").
        items: item id -> Item, the whole catalogue before duplicate titles are merged.
        splits: "train", "valid", "test" -> samples; `sample_id` is the position in its split. A list, or,
            for windows over a log of interactions, a `WindowTable` that makes a sample when it is asked.
        users: user id -> attributes; empty where the data has none.
        notes: what was skipped, dropped or carved, with counts.
        fingerprint: SHA-256 of items, users and splits.
        train_counts: interactions of each item in train, where they are known already.
    """

    name: str
    domain: str
    items: dict[str, Item]
    splits: dict[str, Sequence[Sample]]
    users: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    train_counts: Counter[str] | None = None

    def split(self, name: str) -> Sequence[Sample]:
        """Returns the samples of a split.

        Raises:
            UserError: the split is unknown or empty.
        """
        if name not in self.splits:
            raise UserError(f"split={name}: there is no such split", f"use one of {', '.join(SPLITS)}")
        if not self.splits[name]:
            raise UserError(
                f"split={name}: the {name} split of {self.name} is empty",
                "check data.split_ratio, data.min_history, data.kcore and the file of that split",
            )
        return self.splits[name]


def load_corpus(data: DataSection) -> Corpus:
    """Reads the data that `data.path` names, cuts histories, splits, samples and checks it.

    Raises:
        UserError: missing file or column, malformed row (file, line, field), item id without title, or an
            empty train or test split.
    """
    given, data = data, on_this_machine(data)
    reader = reader_of(data)
    if reader.supervised:
        raise UserError(
            f"data.path={data.path} holds prompts and completions, and this needs interactions with a "
            "catalogue",
            "give interaction data, or use the commands that docs/other-domains.md names",
        )
    known = ("user", "item", "timestamp", "rating", "title", "provider", "genres")
    for role in data.columns:
        if role not in known:
            raise UserError(f"data.columns.{role}: unknown column role", nearest(role, known))
    if data.item_text and not reader.item_table:
        raise UserError(
            f"data.item_text={data.item_text}: the format of {data.path} has no item table",
            "write the data as a table of interactions and one of items (data.format=table)",
        )
    if data.path in embedded_names() or reader is readers()["windows"]:
        return _built(reader, data, given)
    return Corpus(**kept_log(data, lambda: vars(_built(reader, data, given))))


def _built(reader: Reader, data: DataSection, given: DataSection) -> Corpus:
    """Reads and cuts; what the cache spares where it has the result.

    Args:
        given: the section before names of the hub became files.
    """
    bad = BadRows(skip=data.on_bad_row == "skip")
    found = reader.read(data, bad)
    notes: list[str] = []
    if isinstance(found, (Interactions, InteractionColumns)):
        windows, notes = make_windows(found, data)
        notes += unused_for_log(data)
    else:
        windows = found
        notes += unused_for_windows(data, "valid" in windows.splits)
    format_ = next(name for name, known in readers().items() if known is reader)
    notes = bad.notes() + notes
    if data.revision and data is given:
        notes.append(f"data.revision = {data.revision} is not used: nothing is read from the hub")
    notes += unused_by_reader(given, format_, reader.uses(data) if reader.uses else None)
    splits = _finish_splits(windows, data, notes)
    notes += _trained_on(splits)
    is_name = given.path in embedded_names() or given.path != data.path
    name = given.path if is_name else Path(data.path).resolve().name
    corpus = Corpus(name, windows.domain, windows.items, splits, windows.users, notes)
    corpus.split("train")
    corpus.split("test")
    corpus.fingerprint = _fingerprint(corpus)
    return corpus


def _trained_on(splits: dict[str, Sequence[Sample]]) -> list[str]:
    """A line for every held-out split that shares windows with train."""
    lines = []
    for name in ("valid", "test"):
        shared = also_in_train(splits["train"], splits[name])
        if shared:
            lines.append(
                f"{name}: {shared} of {len(splits[name])} windows are also windows of train (same user, "
                "history, target and time): their targets are trained on"
            )
    return lines


def readers() -> dict[str, Reader]:
    """Returns every reader by the name that `data.format` takes."""
    return parts(READERS, "READER")


def embedded_names() -> list[str]:
    """Returns the names of data sets that need no path."""
    return [name for reader in in_order() for name in reader.embedded]


def in_order() -> list[Reader]:
    """Returns every reader, in the order in which they are asked."""
    return sorted(readers().values(), key=lambda reader: reader.order)


def read(data: DataSection, bad: BadRows) -> Any:
    """What the reader of `data` finds, wherever the data lie."""
    return reader_of(data).read(on_this_machine(data), bad)


def reader_of(data: DataSection) -> Reader:
    """Returns the reader that `data.format` names, or the first that recognises `data.path`.

    Raises:
        UserError: there is nothing at that path.
    """
    known = readers()
    data = on_this_machine(data)
    if data.format != "auto" and known[data.format].supervised:
        return known[data.format]
    needs_no_file = data.path in embedded_names() or (
        data.format != "auto" and data.format in known[data.format].embedded
    )
    if not Path(data.path).exists() and not needs_no_file:
        raise UserError(
            f"data.path={data.path}: no such file or folder",
            f"give a path, an embedded set ({', '.join(embedded_names())}), or a data set of the hub as "
            "owner/name or owner/name:config",
        )
    if data.format != "auto":
        return known[data.format]
    return next(reader for reader in in_order() if reader.detect(data))


def _finish_splits(windows: Windows, data: DataSection, notes: list[str]) -> dict[str, Sequence[Sample]]:
    """Cuts histories, drops short ones, carves valid where the files have none, samples and numbers.

    Everything that leaves windows out is noted.
    """
    splits = {name: _long_enough(name, samples, data, notes) for name, samples in windows.splits.items()}
    if "valid" not in splits:
        splits["train"], splits["valid"] = _carve_valid(splits["train"], data, notes)
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
            samples = _chosen(samples, np.sort(chosen))
        splits[name] = _numbered(samples)
    return {name: splits[name] for name in SPLITS}


def _long_enough(
    name: str, samples: Sequence[Sample], data: DataSection, notes: list[str]
) -> Sequence[Sample]:
    """The windows of a split with their newest history items, without windows that have too few."""
    if isinstance(samples, WindowTable):  # its histories are cut already
        kept = samples
        if len(samples) and int(samples.lengths.min()) < data.min_history:
            kept = samples.take(samples.lengths >= data.min_history)
    else:
        cut = [replace(s, history=s.history[-data.history_length :]) for s in samples]
        kept = [s for s in cut if len(s.history) >= data.min_history]
    if len(kept) < len(samples):
        notes.append(
            f"{name}: {len(samples) - len(kept)} of {len(samples)} windows have fewer than "
            f"data.min_history={data.min_history} "
            "history items and are left out"
        )
    return kept


def _chosen(samples: Sequence[Sample], places: np.ndarray) -> Sequence[Sample]:
    if isinstance(samples, WindowTable):
        return samples.take(places)
    return [samples[place] for place in places.tolist()]


def _numbered(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples with their place in the split as `sample_id`."""
    if isinstance(samples, WindowTable):
        return samples
    return [replace(sample, sample_id=place) for place, sample in enumerate(samples)]


def _carve_valid(
    train: Sequence[Sample], data: DataSection, notes: list[str]
) -> tuple[list[Sample], list[Sample]]:
    """Makes the latest windows of train the valid split, in the proportion of `split_ratio`.

    Equal times keep the order of the file.
    """
    share = data.split_ratio[1] / max(data.split_ratio[0] + data.split_ratio[1], 1e-12)
    size = round(len(train) * share)
    order = sorted(
        range(len(train)), key=lambda i: (train[i].timestamp if train[i].timestamp is not None else 0.0, i)
    )
    late = set(order[len(train) - size :])
    if size:
        notes.append(
            f"valid: the files have none; the latest {size} of {len(train)} train windows serve as valid "
            "and are not trained on"
        )
    return [s for i, s in enumerate(train) if i not in late], [s for i, s in enumerate(train) if i in late]


def train_popularity(corpus: Corpus) -> Counter[str]:
    """Counts the interactions per item in train, each once although sliding windows repeat it."""
    if corpus.train_counts is not None:
        return corpus.train_counts
    return count_items(corpus.splits["train"])


def _fingerprint(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    add_record(digest, corpus.domain)
    for item in corpus.items.values():
        add_record(digest, "item", item.item_id, item.title, item.provider, *item.genres)
    for user, attributes in sorted(corpus.users.items()):
        add_record(digest, "user", user, *(f"{k}={v}" for k, v in sorted(attributes.items())))
    for name in SPLITS:
        add_windows(digest, name, corpus.splits[name])
    return digest.hexdigest()
