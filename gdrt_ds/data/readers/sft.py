"""Reader of rows for supervised fine-tuning: prompt and completion, or messages, with groups beside them.

`data.path` is a file (JSONL, JSON, parquet, CSV, Arrow), a folder whose files are named train, valid and
test. A data set of the hub has become such a folder before (_hub.py). Splits come from the files' names, from
a column `split`, or are seeded shares (`data.split_ratio`, `data.sample_seed`). What a row may hold stands in
text_rows.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gdrt_ds.config import DataSection
from gdrt_ds.data.readers import windows
from gdrt_ds.data.readers._datasets import BUILDERS, rows_of_file
from gdrt_ds.data.readers._rows import header_of, read_rows, rows_of_table, suffix_of
from gdrt_ds.data.readers.base import BadRows, Reader
from gdrt_ds.data.text_rows import ROLES, BadField, Columns, Prompt, TextRow, TextRows, row_of
from gdrt_ds.data.unused import unused_for_rows
from gdrt_ds.errors import UserError

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {"train": "train", **dict.fromkeys(windows.VALID, "valid"), "test": "test"}
LINES = (".jsonl", ".json")
SUFFIXES = (*LINES, *BUILDERS)
Numbered = Iterator[tuple[int, dict[str, Any]]]


def read_text_rows(data: DataSection, bad: BadRows) -> TextRows:
    """Reads all splits.

    Raises:
        UserError: missing or unreadable file, a bad row (file, line or row, field), or an empty train split.
    """
    columns = Columns(data.columns)
    notes: list[str] = []
    splits: dict[str, list[TextRow]] = {name: [] for name in SPLITS}
    undivided: list[TextRow] = []
    unseen = dict(data.columns)
    for name, split, rows in _files(data, bad):
        for number, values in rows:
            if unseen:
                unseen = {role: name for role, name in unseen.items() if name not in values}
            try:
                row = row_of(values, columns, len(undivided) + sum(map(len, splits.values())))
                own = split or _split_of(values, columns)
            except BadField as error:
                bad.report(name, number, error.name, str(error))
                continue
            (undivided if own is None else splits[own]).append(row)
    notes += [f"data.columns.{role}={name}: no row has a value of it" for role, name in unseen.items()]
    if undivided and any(splits.values()):
        raise UserError(
            f"data.path={data.path}: {len(undivided)} rows have no `{columns.name('split')}` and others have",
            "give every row a split, or none",
        )
    notes += unused_for_rows(data, has_splits=not undivided)
    if undivided:
        splits = _shares(undivided, data, notes)
    if not splits["train"]:
        raise UserError(
            f"data.path={data.path}: the train split has no row",
            "give a file named train, rows with split=train, or a larger share in data.split_ratio",
        )
    limits = {name: getattr(data, f"limit_{name}") for name in SPLITS}
    chosen = {name: _limited(splits[name], name, limits[name], data.sample_seed, notes) for name in SPLITS}
    notes += trained_on(chosen)
    numbered = {name: [replace(row, sample_id=i) for i, row in enumerate(chosen[name])] for name in SPLITS}
    return TextRows(numbered, [*bad.notes(), *notes])


def _files(data: DataSection, bad: BadRows) -> Iterator[tuple[str, str | None, Numbered]]:
    """Yields (name for messages, split or None, rows) of every file."""
    path = Path(data.path)
    if path.is_dir():
        found = _split_files(path)
        for split, file in found.items():
            yield file.name, split, _rows_of(file, bad)
        return
    if path.is_file():
        yield path.name, None, _rows_of(path, bad)
        return
    raise UserError(
        f"data.path={data.path}: no such file or folder",
        "give a file or folder, or a data set of the hub as owner/name or owner/name:config",
    )


def _split_files(folder: Path) -> dict[str, Path]:
    """The files of a folder by split.

    Raises:
        UserError: there is none for train, or two for one split.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        split = SPLIT_NAMES.get(file.name.split(".")[0])
        if split is None or suffix_of(file) not in SUFFIXES:
            continue
        if split in found:
            raise UserError(
                f"data.path={folder}: {found[split].name} and {file.name} are both the {split} split",
                "keep one of them",
            )
        found[split] = file
    if "train" not in found:
        raise UserError(
            f"data.path={folder}: no file named train with one of the endings {', '.join(SUFFIXES)}",
            "name the files train, valid and test, or give one file as data.path",
        )
    return {name: found[name] for name in SPLITS if name in found}


def _rows_of(file: Path, bad: BadRows) -> Numbered:
    suffix = suffix_of(file)
    if suffix in LINES:
        return read_rows(file, bad)
    if suffix in BUILDERS:
        is_csv = BUILDERS[suffix] == "csv"
        twice = [name for name, count in Counter(header_of(file) if is_csv else []).items() if count > 1]
        if twice:
            raise UserError(
                f"{file}: {' and '.join(f'`{name}`' for name in twice)} stands twice in the header",
                "give every column a name of its own",
            )
        found = rows_of_table(file, bad) if is_csv else rows_of_file(file, suffix)
        return ((number, _present(row, is_csv)) for number, row in found)
    raise UserError(f"{file}: unknown format `{file.suffix}`", f"use one of {', '.join(SUFFIXES)}")


def _present(row: dict[str, Any], is_csv: bool) -> dict[str, Any]:
    """The values that a row has; an empty cell of a CSV file is none."""
    return {name: value for name, value in row.items() if value is not None and not (is_csv and value == "")}


def _split_of(values: dict[str, Any], columns: Columns) -> str | None:
    value = columns.value(values, "split")
    if value is None:
        return None
    split = SPLIT_NAMES.get(str(value))
    if split is None:
        raise BadField(columns.name("split"), f"{value!r}; one of {', '.join(SPLITS)}")
    return split


def _shares(rows: list[TextRow], data: DataSection, notes: list[str]) -> dict[str, list[TextRow]]:
    """Deals rows out at random in the shares of `data.split_ratio`.

    Rows of one user stay together. So do equal rows of users who have no other row.
    """
    rows_of = Counter(row.user_id for row in rows)
    unit_of = [_pair(row) if rows_of[row.user_id] == 1 else row.user_id for row in rows]
    units = list(dict.fromkeys(unit_of))
    order = np.random.default_rng([data.sample_seed, 31]).permutation(len(units))
    first = round(len(units) * data.split_ratio[0])
    second = round(len(units) * (data.split_ratio[0] + data.split_ratio[1]))
    split_of = {}
    for place, index in enumerate(order.tolist()):
        name = "train" if place < first else "valid" if place < second else "test"
        split_of[units[index]] = name
    splits = {
        name: [row for row, unit in zip(rows, unit_of, strict=True) if split_of[unit] == name]
        for name in SPLITS
    }
    sizes = ", ".join(f"{len(splits[name])} {name}" for name in SPLITS)
    notes.append(
        f"no splits are given: seeded shares of {len(rows)} rows (data.split_ratio, "
        f"data.sample_seed={data.sample_seed}): {sizes}"
    )
    return splits


def _pair(row: TextRow) -> tuple[Prompt, str]:
    return row.prompt, row.completion


def trained_on(splits: dict[str, list[TextRow]]) -> list[str]:
    """A line for every held-out split that shares rows with train."""
    known = set(map(_pair, splits["train"]))
    lines = []
    for name in ("valid", "test"):
        rows = splits.get(name, [])
        shared = sum(_pair(row) in known for row in rows)
        if shared:
            lines.append(
                f"{name}: {shared} of {len(rows)} rows are also rows of train (same prompt and "
                "completion): their targets are trained on"
            )
    return lines


def _limited(rows: list[TextRow], name: str, limit: int | None, seed: int, notes: list[str]) -> list[TextRow]:
    """A seeded sample where `data.limit_<split>` is below the rows."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng([seed, SPLITS.index(name)]).choice(len(rows), size=limit, replace=False)
    notes.append(
        f"{name}: a seeded sample of {limit} of {len(rows)} rows (data.limit_{name}, data.sample_seed={seed})"
    )
    return [rows[index] for index in sorted(chosen.tolist())]


def columns_of(path: Path) -> list[str]:
    """The columns of the file, or of the folder's train file; none where they are not looked up.

    Raises:
        UserError: a folder without a train file, or a file that cannot be read.
    """
    file = _split_files(path)["train"] if path.is_dir() else path
    if not file.is_file() or suffix_of(file) not in (".jsonl", ".csv", ".tsv", ".parquet"):
        return []
    return header_of(file)


def detect(data: DataSection) -> bool:
    """Whether the file, or the folder's train file, has the columns of rows."""
    try:
        columns = Columns({role: name for role, name in data.columns.items() if role in ROLES})
        return columns.are_rows(columns_of(Path(data.path)))
    except UserError:
        return False


READER = Reader(detect, read_text_rows, order=15, supervised=True)
