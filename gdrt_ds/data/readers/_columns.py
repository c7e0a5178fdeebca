"""Columns of a log, read in batches by the library `datasets`: tens of millions of rows in little memory.

It reads what is in order, and nothing else. As soon as a batch holds a value that cannot be used as it is,
the file is left to the reader of single rows (table.py), which names the row, or counts it, in the words that
users know. Both give the same columns; tests hold them equal.

Streaming is used because it needs no copy of the file on disk.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gdrt_ds.data.readers._datasets import BUILDERS, name_of, quietly, texts_only
from gdrt_ds.data.readers._rows import begins_too_long, header_of, open_text, suffix_of
from gdrt_ds.data.readers.base import InteractionColumns, Item, Names, as_id, parse_number
from gdrt_ds.files import cache_folder

BATCH = 200_000
"""Rows of a batch."""


EXACT = 2**53
"""From here on a float stands for several whole numbers, so it may be that of two users."""


class NotPlain(Exception):
    """Some row needs a closer look; the text says why."""


@dataclass(frozen=True)
class LogColumns:
    """Which columns of a file are what; None where the file has none or it is not used."""

    user: str
    item: str
    time: str | None
    rating: str | None

    def used(self) -> list[str]:
        return [name for name in (self.user, self.item, self.time, self.rating) if name is not None]


class LogBuilder:
    """Collects the events of a log as numbers, batch by batch or row by row."""

    def __init__(self, items: dict[str, Item], has_times: bool, has_ratings: bool):
        self.items = items
        self._item_number = {item: number for number, item in enumerate(items)}
        self._user_number: dict[str, int] = {}
        self._users = array("i")
        self._items = array("i")
        self._times = array("d") if has_times else None
        self._ratings = array("d") if has_ratings else None

    def add(self, user: str, item: str, time: float | None, rating: float | None) -> None:
        """Adds one event; the item must be among `items`."""
        self._users.append(self._number_of_user(user))
        self._items.append(self._item_number[item])
        if self._times is not None:
            self._times.append(time)
        if self._ratings is not None:
            self._ratings.append(rating)

    def add_batch(self, table: Any, columns: LogColumns) -> None:
        """Adds the rows of an Arrow table.

        Raises:
            NotPlain: a value is missing or unreadable, or an item has no title.
        """
        users = _numbered(table.column(columns.user), self._number_of_user)
        items = _numbered(table.column(columns.item), lambda item: self._item_number.get(item, -1))
        if len(items) and items.min() < 0:
            raise NotPlain("an item has no title")
        times = None if self._times is None else _floats(table.column(columns.time))
        ratings = None if self._ratings is None else _floats(table.column(columns.rating))
        self._users.frombytes(users.tobytes())
        self._items.frombytes(items.tobytes())
        if times is not None:
            self._times.frombytes(times.tobytes())
        if ratings is not None:
            self._ratings.frombytes(ratings.tobytes())

    def _number_of_user(self, user: str) -> int:
        return self._user_number.setdefault(user, len(self._user_number))

    def columns(self, notes: list[str]) -> InteractionColumns:
        """Returns what was collected."""
        return InteractionColumns(
            np.frombuffer(self._users, np.int32),
            np.frombuffer(self._items, np.int32),
            None if self._times is None else np.frombuffer(self._times, np.float64),
            None if self._ratings is None else np.frombuffer(self._ratings, np.float64),
            Names.of(list(self._user_number)),
            self.items,
            notes=notes,
        )


def read_columns(path: Path, columns: LogColumns, builder: LogBuilder) -> None:
    """Adds all rows of a file to the builder.

    Raises:
        NotPlain: the file, or a row of it, has to be read row by row.
    """
    try:
        for table in _batches(path):
            _check_complete(table, path, columns)
            builder.add_batch(table, columns)
    except NotPlain:
        raise
    except Exception as error:  # the library, pandas and pyarrow each raise their own kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise NotPlain(f"the library `datasets` cannot read it ({lines[0][:100]})") from error


def _check_complete(table: Any, path: Path, columns: LogColumns) -> None:
    """Raises NotPlain for a row that lacks a value which it needs, or that may be too short."""
    from pyarrow import compute

    missing = [name for name in columns.used() if name not in table.column_names]
    if missing:
        raise NotPlain(f"some rows have no {missing[0]}")
    if any(table.column(name).null_count for name in columns.used()):
        raise NotPlain("a value is missing")
    # The library fills a row that is too short with empty values, perhaps only in columns that are not used.
    if _builder_of(path) == "csv" and compute.any(compute.equal(table.column(-1), "")).as_py():
        raise NotPlain(f"the last column `{table.column_names[-1]}` has gaps, so a row may be too short")


def _builder_of(path: Path) -> str | None:
    """The builder of `datasets` for a file; None where it has none that gives the rows as they are."""
    suffix = suffix_of(path)
    if suffix in (".jsonl", ".json"):
        with open_text(path) as stream:
            start = stream.read(1000).lstrip()
        return "json" if start.startswith("{") else None
    return BUILDERS.get(suffix)


def _batches(path: Path) -> Iterator[Any]:
    """Yields Arrow tables of up to BATCH rows."""
    builder = _builder_of(path)
    if builder is None:
        raise NotPlain(f"the library `datasets` has no reader of {path.suffix}")
    options: dict[str, Any] = {}
    if builder == "csv":
        separator = "\t" if suffix_of(path) == ".tsv" else ","
        header = header_of(path, separator)
        if len(set(header)) < len(header):
            raise NotPlain("two columns have the same name")
        if begins_too_long(path):
            raise NotPlain("its first row has more fields than its header")
        options = {**texts_only(header, separator), "chunksize": BATCH}
    with quietly() as datasets:
        found = datasets.load_dataset(
            builder,
            data_files=name_of(path),
            split="train",
            streaming=True,
            cache_dir=str(cache_folder() / "datasets"),
            **options,
        )
        yield from found.with_format("arrow").iter(batch_size=BATCH)


def _numbered(column: Any, number_of: Callable[[str], int]) -> np.ndarray:
    """int32[rows]: the number of each id. Ids are read as text once for each different one in the batch."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    is_float = pyarrow.types.is_floating(kind)
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)):
            raise NotPlain(f"ids are of type {kind}")
    parts = [np.zeros(0, np.int32)]
    for chunk in column.chunks:
        encoded = chunk.dictionary_encode()
        values = encoded.dictionary.to_pylist()
        if is_float and any(value is not None and abs(value) >= EXACT for value in values):
            raise NotPlain("ids are read as floats, which are too large to be exact")
        ids = [as_id(value) for value in values]
        if not all(ids):
            raise NotPlain("an id is empty")
        numbers = np.array([number_of(name) for name in ids], dtype=np.int32)
        parts.append(numbers[encoded.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(parts)


def _floats(column: Any) -> np.ndarray:
    """float64[rows]: numbers, or the seconds of dates, as `parse_number` reads them."""
    import pyarrow
    from pyarrow import compute

    kind = column.type
    plain = pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)
    text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    values = None
    if plain or text:
        try:
            values = compute.cast(column, pyarrow.float64(), safe=not plain).to_numpy()
        except pyarrow.ArrowInvalid:
            values = None  # dates, or numbers that only Python reads
    if values is None:
        try:
            values = np.array([parse_number(value) for value in column.to_pylist()], dtype=np.float64)
        except ValueError as error:
            raise NotPlain(str(error)) from None
    if not np.isfinite(values).all():
        raise NotPlain("a number is not finite")
    return values
