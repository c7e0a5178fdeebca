"""Reader of plain tables: interactions, items and users.

Interactions are (user, item, timestamp[, rating]), items (id, title[, provider, genres]). The files are CSV,
TSV, JSONL, JSON or parquet. `data.path` is the interactions file, or a folder that holds interactions.*,
items.* and perhaps users.*. `data.items` and `data.users` name the other two where they lie elsewhere;
`data.columns` renames columns.
"""

from __future__ import annotations

from pathlib import Path

from gdrt_ds.config import DataSection
from gdrt_ds.data.readers import _columns
from gdrt_ds.data.readers._rows import (
    TABLE_SUFFIXES,
    header_of,
    pick_column,
    read_rows,
    require_columns,
    require_file,
    rows_of_table,
)
from gdrt_ds.data.readers.base import (
    RATINGS_UNUSED,
    BadRows,
    InteractionColumns,
    Item,
    Reader,
    as_id,
    clean_title,
    guess_domain,
    parse_genres,
    parse_number,
)
from gdrt_ds.data.text_rows import HALF, is_whole
from gdrt_ds.errors import UserError, nearest

INTERACTION_NAMES = ("interactions", "inter", "ratings", "events", "reviews")
ITEM_NAMES = ("items", "item", "movies", "books", "products", "meta", "metadata")
USER_NAMES = ("users", "user")
USER = ("user", "user_id", "userId", "uid", "reviewerID")
ITEM = ("item", "item_id", "itemId", "movieId", "parent_asin", "asin", "iid")
TIMESTAMP = ("timestamp", "time", "unixReviewTime", "date", "ts")
RATING = ("rating", "overall", "score", "stars")
TITLE = ("title", "item_title", "movie_title", "name")
PROVIDER = ("provider", "brand", "author", "director", "publisher", "store", "studio")
GENRES = ("genres", "genre", "categories", "category", "class")


USES = (
    "items",
    "users",
    *(f"columns.{role}" for role in ("user", "item", "timestamp", "rating", "title", "provider", "genres")),
)
"""Settings that the tables of interactions, items and users are read by."""


def find_table(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Returns the first `name + suffix` that is in the folder, or None."""
    return next(
        (
            folder / (name + suffix)
            for name in names
            for suffix in TABLE_SUFFIXES
            if (folder / (name + suffix)).is_file()
        ),
        None,
    )


def read_table(data: DataSection, bad: BadRows) -> InteractionColumns:
    """Reads interactions, items and users.

    Raises:
        UserError: missing file or column, unreadable value (file, line, field), item id without title.
    """
    path = Path(data.path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        found = find_table(path, INTERACTION_NAMES)
        if found is None:
            raise UserError(
                f"data.path={data.path}: no interactions file there",
                f"expected one of {', '.join(n + '.*' for n in INTERACTION_NAMES)} with a suffix of "
                f"{', '.join(TABLE_SUFFIXES)}",
            )
        path = found
    items_path = Path(data.items) if data.items else find_table(folder, ITEM_NAMES)
    if items_path is None:
        raise UserError(
            f"data.path={data.path}: no item table beside it",
            "put items.csv (item_id,title[,provider,genres]) there, or set data.items",
        )
    require_file(items_path, "data.items")
    items = read_item_table(items_path, data, bad)
    events = read_events(path, data, bad, items, items_path)
    events.users = read_user_table(data, folder, bad)
    events.domain = guess_domain(folder.resolve().name)
    return events


def read_events(
    path: Path, data: DataSection, bad: BadRows, items: dict[str, Item], items_path: Path
) -> InteractionColumns:
    """Reads the interactions of one file; rows whose item has no title are bad rows.

    The file is read as columns. Where a row is not in order, it is read again row by row, which names the row
    or counts it.
    """
    columns, notes = _columns_of(path, data)
    try:
        builder = _columns.LogBuilder(items, columns.time is not None, columns.rating is not None)
        _columns.read_columns(path, columns, builder)
        return builder.columns(notes)
    except _columns.NotPlain as reason:
        notes = [*notes, f"{path.name} is read row by row: {reason}"]
    builder = _columns.LogBuilder(items, columns.time is not None, columns.rating is not None)
    _read_rows(path, columns, builder, bad, items_path)
    return builder.columns(notes)


def _columns_of(path: Path, data: DataSection) -> tuple[_columns.LogColumns, list[str]]:
    """Which columns are what, and a note where ratings are there and not used.

    Raises:
        UserError: a column is missing.
    """
    header = header_of(path)
    needed = {"user": USER, "item": ITEM}
    if data.split == "time":
        needed["timestamp"] = TIMESTAMP
    if data.min_rating is not None:
        needed["rating"] = RATING
    require_columns(path, header, needed, data.columns)
    user = pick_column(path, header, "user", USER, data.columns)
    item = pick_column(path, header, "item", ITEM, data.columns)
    time = pick_column(path, header, "timestamp", TIMESTAMP, data.columns, required=data.split == "time")
    rating = pick_column(path, header, "rating", RATING, data.columns, required=data.min_rating is not None)
    notes = []
    if rating is not None and data.min_rating is None:
        notes.append(RATINGS_UNUSED)
        rating = None
    return _columns.LogColumns(user, item, time, rating), notes


def _read_rows(
    path: Path, columns: _columns.LogColumns, builder: _columns.LogBuilder, bad: BadRows, items_path: Path
) -> None:
    for line, row in read_rows(path, bad):
        values = []
        for column in (columns.user, columns.item):
            value = as_id(row.get(column))
            if not value:
                bad.report(path, line, column, "empty id")
                break
            values.append(value)
        if len(values) < 2:
            continue
        try:
            field = columns.time
            timestamp = parse_number(row.get(columns.time)) if columns.time else None
            field = columns.rating
            rating = parse_number(row.get(columns.rating)) if columns.rating else None
        except ValueError as error:
            bad.report(path, line, field, str(error))
            continue
        if values[1] not in builder.items:
            bad.report(
                path,
                line,
                columns.item,
                f"item id {values[1]} has no title in {items_path.name}",
                "item id without a title",
            )
            continue
        builder.add(values[0], values[1], timestamp, rating)


def read_item_table(path: Path, data: DataSection, bad: BadRows) -> dict[str, Item]:
    """Reads the item table: id and text are needed, provider and genres are taken where they are there.

    The text is the title, or the column that `data.item_text` names; the title is then the item's name.
    """
    header = header_of(path)
    needed = {"item": (*ITEM, "id")}
    if data.item_text is None:
        needed["title"] = TITLE
    require_columns(path, header, needed, data.columns)
    item_column = pick_column(
        path, header, "item", ITEM + ("id",), {k: v for k, v in data.columns.items() if v in header}
    )
    text_column, name_column = text_columns(path, header, data)
    provider_column = pick_column(
        path, header, "provider", PROVIDER, data.columns, required="provider" in data.columns
    )
    genres_column = pick_column(
        path, header, "genres", GENRES, data.columns, required="genres" in data.columns
    )
    items: dict[str, Item] = {}
    for line, row in rows_of_table(path, bad):
        item = as_id(row.get(item_column))
        if not item:
            bad.report(path, line, item_column, "empty id")
            continue
        try:
            title, provider, name = (
                _text(row, field := column) for column in (text_column, provider_column, name_column)
            )
        except ValueError as error:
            bad.report(path, line, field, str(error))
            continue
        if not title:  # an interaction with it is a bad row, see read_events
            continue
        if item in items and items[item].title != title:
            bad.report(
                path,
                line,
                item_column,
                f"item id {item} is there twice, as {items[item].title!r} and {title!r}",
                "item ids that repeat",
            )
            continue
        genres = parse_genres(row.get(genres_column)) if genres_column else ()
        items[item] = Item(item, title, provider or None, genres, name or None)
    return items


def text_columns(path: Path, header: list[str], data: DataSection) -> tuple[str, str | None]:
    """Returns the column of the items' texts, and that of their names where the texts are not the titles.

    Raises:
        UserError: `data.item_text` names no column, or no title column is found.
    """
    if data.item_text is None:
        title_column = pick_column(path, header, "title", TITLE, data.columns)
        assert title_column is not None
        return title_column, None
    if data.item_text not in header:
        raise UserError(
            f"data.item_text={data.item_text}: {path.name} has no such column; it has {', '.join(header)}",
            nearest(data.item_text, header),
        )
    title_column = pick_column(path, header, "title", TITLE, data.columns, required=False)
    if title_column == data.item_text:
        return data.item_text, None
    return data.item_text, title_column


def _text(row: dict, column: str | None) -> str:
    """The cleaned text of a column; empty where the row or the table has none.

    Raises:
        ValueError: the text is not whole.
    """
    if column is None or row.get(column) is None:
        return ""
    text = clean_title(str(row[column]))
    if not is_whole(text):
        raise ValueError(f"{text!r} {HALF}")
    return text


def read_user_table(data: DataSection, folder: Path, bad: BadRows) -> dict[str, dict[str, str]]:
    """Returns {user: {attribute: value}}; it is empty where there is no user table.

    Every column but the id is an attribute.
    """
    path = require_file(Path(data.users), "data.users") if data.users else find_table(folder, USER_NAMES)
    if path is None:
        return {}
    header = header_of(path)
    column = pick_column(
        path, header, "user", USER + ("id",), {k: v for k, v in data.columns.items() if v in header}
    )
    users = {}
    for line, row in rows_of_table(path, bad):
        user = as_id(row.get(column))
        if not user:
            bad.report(path, line, column, "empty id")
            continue
        users[user] = {
            name: str(value) for name, value in row.items() if name != column and value is not None
        }
    return users


# A table is what is left when nothing else recognises the data, so it is asked last.
READER = Reader(
    lambda data: Path(data.path).exists(), read_table, order=90, item_table=True, uses=lambda data: USES
)
