"""Reader of ready-made windows: the family of MSL, LBR and BIGRec.

The files are CSV, or any other table that _rows.py reads. MSL and LBR: train.csv, valid.csv, test.csv with
`user_id,item_ids,timestamp` (`item_ids` is a list literal, its last id the target) and id2name4Rec.json
(item id -> title). BIGRec and its descendants: the history and the target in separate columns
(`history_item_id`, `item_id`) and often their titles (`history_item_title`, `item_title`), from which the
item table is made when no other is given. Any other column becomes a label of the sample;
where a row has no value there, the sample has no such label.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from gdrt_ds.config import DataSection
from gdrt_ds.data.readers._rows import header_of, open_text, pick_column, require_file, rows_of_table
from gdrt_ds.data.readers.base import (
    BadRows,
    Item,
    Reader,
    Sample,
    Windows,
    as_id,
    clean_title,
    guess_domain,
    parse_list,
    parse_number,
)
from gdrt_ds.data.readers.table import find_table, read_item_table, read_user_table
from gdrt_ds.data.text_rows import HALF, is_whole
from gdrt_ds.errors import UserError

ITEM_NAME_FILES = ("id2name4Rec.json", "id2name.json")
ITEM_TABLE_FILES = ("items.csv", "items.tsv", "items.jsonl", "items.parquet")
VALID = ("valid", "validation", "val", "dev")
"""Names of the valid split's file."""
USER = ("user_id", "user", "uid")
WINDOW = ("item_ids", "items", "sequence")
HISTORY = ("history_item_id", "history_item_ids", "history_ids", "history_item_asin", "item_asins")
HISTORY_TITLE = ("history_item_title", "history_item_titles", "history_titles", "history")
TARGET = ("item_id", "target_id", "item_asin", "target")
TARGET_TITLE = ("item_title", "target_title", "title")
TIMESTAMP = ("timestamp", "time")
_ALL = {
    name
    for group in (USER, WINDOW, HISTORY, HISTORY_TITLE, TARGET, TARGET_TITLE, TIMESTAMP)
    for name in group
}


def read_windows(data: DataSection, bad: BadRows) -> Windows:
    """Reads a folder of windows.

    A split whose file is not there is left out of the result; train and test must be there.

    Raises:
        UserError: missing file or column, malformed list, empty history, or item id without title.
    """
    folder = Path(data.path)
    if folder.is_file():
        raise _no_folder(folder)
    paths = {split: _split_file(folder, split) for split in ("train", "valid", "test")}
    if data.train_file:
        paths["train"] = folder / data.train_file
    _require_train(paths["train"], data)
    require_file(paths["test"], "data.path")
    for split in ("valid", "test"):
        if paths[split].is_file() and paths["train"].samefile(paths[split]):
            raise UserError(
                f"data.train_file = {data.train_file}: this is the file of the {split} windows, so their "
                "targets would be trained on",
                "name a file of train windows, or leave data.train_file empty for train.csv",
            )
    titles: dict[str, str] = {}
    elsewhere = _columns_of_items(folder, data)
    splits = {
        split: _read_split(path, data, bad, titles, elsewhere)
        for split, path in paths.items()
        if path.is_file()
    }
    items = _read_items(folder, data, bad, titles)
    for split in splits:
        splits[split] = _titled(splits[split], items, paths[split], bad)
    return Windows(splits, items, read_user_table(data, folder, bad), guess_domain(folder.resolve().name))


def _split_file(folder: Path, split: str) -> Path:
    """The file of a split's windows; the name that it should have where there is none.

    Raises:
        UserError: two files are the valid split.
    """
    names = VALID if split == "valid" else (split,)
    found = [file for name in names if (file := find_table(folder, (name,)))]
    if len(found) > 1:
        raise UserError(
            f"data.path={folder}: {' and '.join(file.name for file in found)} are both the {split} split",
            "keep one of them",
        )
    return found[0] if found else folder / f"{split}.csv"


def _no_folder(file: Path) -> UserError:
    fix = f"set data.path={file.parent}"
    if file.name not in [f"{split}.csv" for split in ("train", "test", *VALID)]:
        fix += f" data.train_file={file.name}"
    return UserError(
        f"data.path={file}: this is one file of a folder of windows; the folder is expected", fix
    )


def _require_train(path: Path, data: DataSection) -> None:
    """The file of train windows, or UserError with the files that may have been meant."""
    setting = "data.train_file" if data.train_file else "data.path"
    others = sorted(set(path.parent.glob("*train*.csv")) - {path})
    if path.is_file() or not others:
        require_file(path, setting)
        return
    names = ", ".join(other.name for other in others)
    raise UserError(
        f"{setting}: {path}: no such file; the folder has {names}",
        f"set data.train_file={others[0].name}",
    )


def _read_split(
    path: Path, data: DataSection, bad: BadRows, titles: dict[str, str], elsewhere: list[str]
) -> list[tuple[int, Sample]]:
    header = header_of(path)
    renamed = {role: name for role, name in data.columns.items() if name in header or name not in elsewhere}
    user_column = pick_column(path, header, "user", USER, renamed)
    time_column = pick_column(path, header, "timestamp", TIMESTAMP, renamed, required=False)
    window = pick_column(path, header, "item", WINDOW, renamed, required=False)
    history_column = target_column = history_titles = target_title = None
    if window is None:
        history_titles = pick_column(path, header, "history_title", HISTORY_TITLE, {}, required=False)
        target_title = pick_column(path, header, "title", TARGET_TITLE, renamed, required=False)
        history_column = pick_column(path, header, "history", HISTORY, {}, required=False)
        target_column = pick_column(path, header, "item", TARGET, renamed, required=False)
        if history_column is None or target_column is None:
            history_column = history_titles
            target_column = target_title
        if history_column is None or target_column is None:
            raise UserError(
                f"{path.name}: missing column `item_ids`; it has {', '.join(header)}",
                "windows need item_ids (last = target), or history_item_id and item_id, or "
                "history_item_title and item_title; "
                "data.columns.item renames item_ids",
            )
    label_columns = [
        name
        for name in header
        if name not in _ALL
        and name not in (user_column, time_column, window)
        and name
        and not name.lower().startswith(("history", "unnamed"))
    ]
    samples: list[tuple[int, Sample]] = []
    for line, row in rows_of_table(path, bad):
        try:
            field = window or history_column
            sequence = [as_id(value) for value in parse_list(_present(row, field))]
            if window is None and history_titles and target_title:
                field = history_titles
                names = [_whole(name) for name in parse_list(_present(row, field))]
                field = target_title
                name_of_target = _whole(_present(row, field))
            if window is None:
                field = target_column
                sequence.append(as_id(_present(row, field)))
        except ValueError as error:
            is_list = field not in (target_title, target_column)
            bad.report(path, line, field, str(error), "malformed list" if is_list else None)
            continue
        field = window or history_column
        if window is None and history_titles and target_title:
            if len(names) != len(sequence) - 1:
                bad.report(
                    path,
                    line,
                    history_titles,
                    f"{len(names)} titles for {len(sequence) - 1} items",
                    "titles and ids differ in number",
                )
                continue
            titles.update(zip(sequence, [*names, name_of_target]))
        if not all(sequence):
            bad.report(path, line, field, "an item id is empty", "empty item id")
            continue
        if len(sequence) < 2:
            bad.report(
                path,
                line,
                field,
                f"empty history: {len(sequence)} item in the window, at least one before the target is "
                "needed",
                "empty history",
            )
            continue
        timestamp = None
        if time_column and row.get(time_column) not in ("", None):
            try:
                timestamp = parse_number(row[time_column])
            except ValueError as error:
                bad.report(path, line, time_column, str(error))
                continue
        user = as_id(row.get(user_column))
        if not user:
            bad.report(path, line, user_column, "empty user id", "empty user id")
            continue
        labels = _labels(row, label_columns)
        samples.append(
            (line, Sample(len(samples), user, tuple(sequence[:-1]), sequence[-1], timestamp, labels))
        )
    return samples


def _labels(row: dict, columns: list[str]) -> dict[str, str]:
    """The labels that a row has. What is missing or empty is no label, so it makes no group of its own."""
    values = {name: row.get(name) for name in columns}
    return {name: str(value) for name, value in values.items() if not _is_missing(value)}


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _present(row: dict, column: str) -> Any:
    """The value of a column; ValueError where the row has none, as a line of JSON may."""
    if row.get(column) is None:
        raise ValueError("it is missing")
    return row[column]


def _whole(title: object) -> str:
    """A title as text; ValueError where it is not whole."""
    if not is_whole(str(title)):
        raise ValueError(f"the title {title!r} {HALF}")
    return str(title)


def _items_file(folder: Path, data: DataSection) -> Path | None:
    """The file of the items' titles; None where the windows have to carry them."""
    if data.items:
        return Path(data.items)
    places = [folder / name for name in ITEM_NAME_FILES + ITEM_TABLE_FILES]
    return next((place for place in places if place.is_file()), None)


def _columns_of_items(folder: Path, data: DataSection) -> list[str]:
    """The columns of the item table, which `data.columns` may mean; none where the titles have no table."""
    path = _items_file(folder, data)
    return header_of(path) if path is not None and _is_table(path) else []


def _is_table(path: Path) -> bool:
    """Whether a file of titles has columns; an object {item id: title} has none."""
    if path.suffix != ".json" or not path.is_file():
        return path.is_file()
    with open_text(path) as stream:
        return stream.read(1000).lstrip().startswith("[")


def _read_items(folder: Path, data: DataSection, bad: BadRows, titles: dict[str, str]) -> dict[str, Item]:
    path = _items_file(folder, data)
    if data.item_text and (path is None or path.suffix == ".json"):
        raise UserError(
            f"data.item_text={data.item_text}: the titles come from {path.name if path else 'the windows'}, "
            "which has no columns",
            "set data.items to an item table that has this column",
        )
    if path is None:
        if titles:
            return {
                item: Item(item, clean_title(title)) for item, title in titles.items() if clean_title(title)
            }
        raise UserError(
            f"data.path={data.path}: no item titles: {ITEM_NAME_FILES[0]} is not there and the rows carry "
            "none",
            f"put {ITEM_NAME_FILES[0]} (item id -> title) into the folder, or set data.items=<file>",
        )
    require_file(path, "data.items")
    if path.suffix != ".json":
        return read_item_table(path, data, bad)
    with open_text(path) as stream:
        try:
            names = json.load(stream)
        except ValueError as error:
            raise UserError(
                f"{path}: not valid JSON: {error}", "expected an object {item id: title}"
            ) from None
    if not isinstance(names, dict):
        return read_item_table(path, data, bad)
    items = {}
    for item, title in names.items():
        cleaned = clean_title(title) if isinstance(title, str) else ""
        if not is_whole(cleaned):
            bad.report(path, None, item, f"the title {cleaned!r} {HALF}", "titles with half of a character")
        elif cleaned:  # a window that uses an item without a title is a bad row, see _titled
            items[str(item)] = Item(str(item), cleaned)
    return items


def _titled(rows: list[tuple[int, Sample]], items: dict[str, Item], path: Path, bad: BadRows) -> list[Sample]:
    """Returns the samples whose items all have titles.

    When bad rows are skipped, an untitled item leaves the history. An untitled target ends the window.
    """
    kept = []
    for line, sample in rows:
        missing = [item for item in sample.history if item not in items]
        for item in missing:
            bad.report(
                path,
                line,
                "history",
                f"item id {item} has no title in the item table",
                "history items left out of their window, without a title",
                row_stays=True,
            )
        if missing:
            sample = replace(sample, history=tuple(item for item in sample.history if item in items))
        if sample.target not in items:
            bad.report(
                path,
                line,
                "target",
                f"item id {sample.target} has no title in the item table",
                "target without a title",
            )
        elif not sample.history:
            bad.report(path, line, "history", "no history item with a title is left", "empty history")
        else:
            kept.append(sample)
    return kept


def _has_windows(data: DataSection) -> bool:
    """A folder with train or test windows; or one of its files, which is then refused in words."""
    path = Path(data.path)
    if path.is_file():
        beside = any((path.parent / name).is_file() for name in ITEM_NAME_FILES)
        return beside and data.items is None and path.name.startswith(("train", "test", *VALID))
    names = [data.train_file] if data.train_file else []
    return path.is_dir() and (
        any((path / name).is_file() for name in names) or find_table(path, ("train", "test")) is not None
    )


def _uses(data: DataSection) -> list[str]:
    roles = ["user", "item", "timestamp"]
    path = _items_file(Path(data.path), data)
    if path is None or _is_table(path):
        roles += ["title"] if path is None else ["title", "provider", "genres"]
    return ["items", "users", "train_file", *(f"columns.{role}" for role in roles)]


READER = Reader(_has_windows, read_windows, order=20, item_table=True, uses=_uses)
