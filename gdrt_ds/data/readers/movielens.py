"""Reader of MovieLens: ml-100k (u.data), ml-1m (.dat), ml-latest (CSV), and the ml-100k of recbole.

The embedded set is read from the wheel's files, found through package metadata; recbole itself is never
imported. Titles are written as in MovieLens, with the year: `Toy Story (1995)`.

Only the embedded set has providers, from its knowledge graph. They are the directors
(`film.film.directed_by`); `data.columns.provider=film.film.production_companies` takes companies instead. A
film with several takes the one with most films in the set, then the smallest id. Providers are Freebase ids,
because the set has no names.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter, defaultdict
from pathlib import Path

from gdrt_ds.config import DataSection
from gdrt_ds.data.readers._columns import LogBuilder
from gdrt_ds.data.readers._rows import open_text, require_file
from gdrt_ds.data.readers.base import BadRows, InteractionColumns, Item, Reader, clean_title, parse_number
from gdrt_ds.errors import UserError, nearest

DIRECTED_BY = "film.film.directed_by"
_INSTALL = "pip install --no-deps recbole==1.2.1"
_LATEST = ("ratings.csv", "movies.csv")
ML100K_GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
ML1M_OCCUPATIONS = (
    "other",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)


def is_movielens(folder: Path) -> bool:
    """Whether a folder has one of the three published layouts."""
    return any(
        all((folder / name).is_file() for name in names)
        for names in (("u.data", "u.item"), ("ratings.dat", "movies.dat"), _LATEST)
    )


def read_movielens(data: DataSection, bad: BadRows) -> InteractionColumns:
    """Reads a MovieLens folder.

    Raises:
        UserError: none of the layouts is there; a row cannot be read; a rated film has no title.
    """
    folder = Path(data.path)
    if (folder / "u.data").is_file():
        return _read_100k(folder, bad)
    if (folder / "ratings.dat").is_file():
        return _read_1m(folder, bad)
    if (folder / "ratings.csv").is_file():
        return _read_latest(folder, data, bad)
    raise UserError(
        f"data.path={data.path}: no MovieLens files there",
        "expected u.data and u.item, ratings.dat and movies.dat, or ratings.csv and movies.csv",
    )


def read_embedded_ml100k(data: DataSection, bad: BadRows) -> InteractionColumns:
    """Reads ml-100k out of the installed recbole wheel.

    Raises:
        UserError: the package is not installed or has no such files.
    """
    try:
        folder = Path(
            str(importlib.metadata.distribution("recbole").locate_file("recbole/dataset_example/ml-100k"))
        )
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "data.path=ml-100k: the package recbole, which carries MovieLens-100k, is not installed", _INSTALL
        ) from None
    if not (folder / "ml-100k.inter").is_file():
        raise UserError(
            f"data.path=ml-100k: the installed recbole {importlib.metadata.version('recbole')} has no "
            "dataset_example/ml-100k",
            _INSTALL,
        )
    relation = data.columns.get("provider", DIRECTED_BY)
    providers = _providers(folder, relation)
    items = {}
    for _, row in _atomic(folder / "ml-100k.item", bad):
        title = clean_title(row["movie_title"])
        if not title:  # a rating of it is a bad row, see _collect
            continue
        year = row["release_year"].strip()
        items[row["item_id"]] = Item(
            row["item_id"],
            f"{title} ({year})" if year.isdigit() else title,
            providers.get(row["item_id"]),
            tuple(row["class"].split()),
        )
    users = {
        row["user_id"]: {name: row[name] for name in ("age", "gender", "occupation")}
        for line, row in _atomic(folder / "ml-100k.user", bad)
    }
    rows = (
        (line, row["user_id"], row["item_id"], row["rating"], row["timestamp"])
        for line, row in _atomic(folder / "ml-100k.inter", bad)
    )
    return _collect(folder / "ml-100k.inter", rows, items, users, bad)


def _atomic(path: Path, bad: BadRows):
    """Reads the rows of a RecBole atomic file: tab-separated, with a header of `name:type`."""
    with open_text(require_file(path, "data.path")) as stream:
        names = [column.partition(":")[0] for column in stream.readline().rstrip("\r\n").split("\t")]
        for line, text in enumerate(stream, start=2):
            values = text.rstrip("\r\n").split("\t")
            if len(values) != len(names):
                bad.report(
                    path,
                    line,
                    "(row)",
                    f"{len(values)} fields where the header has {len(names)}",
                    "wrong number of fields",
                )
                continue
            yield line, dict(zip(names, values))


def _providers(folder: Path, relation: str) -> dict[str, str]:
    item_of = {
        row["entity_id"]: row["item_id"] for _, row in _atomic(folder / "ml-100k.link", BadRows(False))
    }
    linked: dict[str, set[str]] = defaultdict(set)
    relations = set()
    for _, row in _atomic(folder / "ml-100k.kg", BadRows(False)):
        relations.add(row["relation_id"])
        if row["relation_id"] == relation and row["head_id"] in item_of:
            linked[item_of[row["head_id"]]].add(row["tail_id"])
    if not linked:
        raise UserError(
            f"data.columns.provider={relation}: the knowledge graph of ml-100k has no such relation from "
            "films",
            nearest(relation, sorted(r for r in relations if r.startswith("film.film."))),
        )
    num_films = Counter(provider for found in linked.values() for provider in found)
    return {item: min(found, key=lambda p: (-num_films[p], p)) for item, found in linked.items()}


def _collect(
    path: Path, rows, items: dict[str, Item], users: dict[str, dict[str, str]], bad: BadRows
) -> InteractionColumns:
    builder = LogBuilder(items, has_times=True, has_ratings=True)
    for line, user, item, rating, timestamp in rows:
        try:
            field = "rating"
            rating = parse_number(rating)
            field = "timestamp"
            timestamp = parse_number(timestamp)
        except ValueError as error:
            bad.report(path, line, field, str(error))
            continue
        if item not in items:
            bad.report(path, line, "item", f"item id {item} has no title", "item id without a title")
            continue
        builder.add(user, item, timestamp, rating)
    events = builder.columns([])
    events.users = users
    events.domain = "movie"
    return events


def _encoding_of(path: Path) -> str:
    """UTF-8 where the whole file is that, else Latin-1, which every file is.

    100k and 1M are published in Latin-1. 10M has the layout of 1M and is UTF-8, and so are many copies.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            while stream.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def _split_lines(path: Path, separator: str, num_fields: int, bad: BadRows):
    """Yields (line number, fields) of a file without header."""
    require_file(path, "data.path")
    with open_text(path, encoding=_encoding_of(path)) as stream:
        for line, text in enumerate(stream, start=1):
            fields = text.rstrip("\r\n").split(separator)
            if len(fields) < num_fields:
                if text.strip():
                    bad.report(
                        path,
                        line,
                        "(row)",
                        f"{len(fields)} fields, {num_fields} expected",
                        "wrong number of fields",
                    )
                continue
            yield line, fields


def _read_100k(folder: Path, bad: BadRows) -> InteractionColumns:
    items = {}
    for _, fields in _split_lines(folder / "u.item", "|", 5, bad):
        title = clean_title(fields[1])
        if not title:  # a rating of it is a bad row, see _collect
            continue
        genres = tuple(name for name, flag in zip(ML100K_GENRES, fields[5:]) if flag == "1")
        items[fields[0]] = Item(fields[0], title, None, genres)
    users = {}
    if (folder / "u.user").is_file():
        users = {
            f[0]: {"age": f[1], "gender": f[2], "occupation": f[3]}
            for _, f in _split_lines(folder / "u.user", "|", 4, bad)
        }
    rows = ((line, *fields[:4]) for line, fields in _split_lines(folder / "u.data", "\t", 4, bad))
    return _collect(folder / "u.data", rows, items, users, bad)


def _read_1m(folder: Path, bad: BadRows) -> InteractionColumns:
    items = {}
    for _, fields in _split_lines(folder / "movies.dat", "::", 2, bad):
        title = clean_title(fields[1])
        if not title:  # a rating of it is a bad row, see _collect
            continue
        items[fields[0]] = Item(
            fields[0], title, None, tuple(fields[2].split("|")) if len(fields) > 2 and fields[2] else ()
        )
    users = {}
    if (folder / "users.dat").is_file():
        for _, f in _split_lines(folder / "users.dat", "::", 4, bad):
            occupation = (
                ML1M_OCCUPATIONS[int(f[3])] if f[3].isdigit() and int(f[3]) < len(ML1M_OCCUPATIONS) else f[3]
            )
            users[f[0]] = {"gender": f[1], "age": f[2], "occupation": occupation}
    rows = ((line, *fields[:4]) for line, fields in _split_lines(folder / "ratings.dat", "::", 4, bad))
    return _collect(folder / "ratings.dat", rows, items, users, bad)


def _read_latest(folder: Path, data: DataSection, bad: BadRows) -> InteractionColumns:
    from gdrt_ds.data.readers.table import read_events, read_item_table, read_user_table

    items_path = require_file(Path(data.items) if data.items else folder / "movies.csv", "data.items")
    items = read_item_table(items_path, data, bad)
    items = {
        key: Item(i.item_id, i.title, i.provider, tuple(g for g in i.genres if g != "(no genres listed)"))
        for key, i in items.items()
    }
    events = read_events(folder / "ratings.csv", data, bad, items, items_path)
    events.users = read_user_table(data, folder, bad)
    events.domain = "movie"
    return events


def _is_embedded(data: DataSection) -> bool:
    return data.path == "ml-100k" and not Path(data.path).exists()


def _detect(data: DataSection) -> bool:
    path = Path(data.path)
    return _is_embedded(data) or (path.is_dir() and is_movielens(path))


def _read(data: DataSection, bad: BadRows) -> InteractionColumns:
    if _is_embedded(data):
        return read_embedded_ml100k(data, bad)
    return read_movielens(data, bad)


def _uses(data: DataSection) -> tuple[str, ...]:
    from gdrt_ds.data.readers.table import USES

    if _is_embedded(data):
        return ("columns.provider",)
    old = any((Path(data.path) / name).is_file() for name in ("u.data", "ratings.dat"))
    return () if old else USES


READER = Reader(_detect, _read, order=30, embedded=("ml-100k",), uses=_uses)
