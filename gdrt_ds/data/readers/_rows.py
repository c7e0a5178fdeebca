"""Rows of a file as dictionaries, with their line numbers.

CSV, TSV, JSONL and JSON are read line by line here, because a broken line can then be named and left out;
gzip where the name ends in .gz. Parquet and Arrow have no lines: the library `datasets` reads them
(_datasets.py). Every reader uses this file, so that a broken row is named in the same words everywhere.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gdrt_ds.data.readers._datasets import columns_of_file, rows_in_order, rows_of_file
from gdrt_ds.data.readers.base import BadRows
from gdrt_ds.errors import UserError, nearest

TABLE_SUFFIXES = (
    ".csv",
    ".tsv",
    ".jsonl",
    ".json",
    ".parquet",
    ".arrow",
    ".csv.gz",
    ".tsv.gz",
    ".jsonl.gz",
    ".json.gz",
)
KEY_ROWS = 10_000
"""Objects of a JSON file whose keys are taken for its columns."""
_END = "\x1e(end of the file)\x1e"
"""A last line for the reader of CSV: it becomes part of a cell whose quote is still open."""
_UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError)


def suffix_of(path: Path) -> str:
    """Returns `.csv` for x.csv and x.csv.gz alike."""
    name = path.name[:-3] if path.name.endswith(".gz") else path.name
    return Path(name).suffix.lower()


def require_file(path: Path, setting: str) -> Path:
    """Returns the path, or raises UserError with the setting that led to it."""
    if not path.is_file():
        raise UserError(
            f"{setting}: {path}: no such file",
            f"check {setting}; the section on your own data in README.md lists the formats",
        )
    return path


@contextmanager
def open_text(path: Path, encoding: str = "utf-8-sig") -> Iterator[io.TextIOBase]:
    """Opens plain or gzip text; whatever makes it unreadable becomes a UserError that names the file."""
    try:
        if path.name.endswith(".gz"):
            stream = gzip.open(path, "rt", encoding=encoding, newline="")
        else:
            stream = open(path, encoding=encoding, newline="")
        with stream:
            yield stream
    except _UNREADABLE as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, UnicodeDecodeError):
            reason = f"not {encoding} text ({error})"
        raise UserError(
            f"{path}: cannot be read: {reason}",
            "check that the file is complete and readable, and its encoding UTF-8",
        ) from None


def read_rows(path: Path, bad: BadRows, delimiter: str | None = None) -> Iterator[tuple[int, dict]]:
    """Yields (line number, row) of any table file.

    Line 1 is the first line of the file; of a parquet file it is the first row.

    Raises:
        UserError: missing or unreadable file, unknown suffix, or a broken row when bad rows are errors.
    """
    require_file(path, "data.path")
    suffix = suffix_of(path)
    if suffix in (".csv", ".tsv") or delimiter:
        yield from _read_delimited(path, bad, delimiter or ("\t" if suffix == ".tsv" else ","))
    elif suffix == ".jsonl":
        yield from _read_json_lines(path, bad)
    elif suffix == ".json":
        yield from _read_json(path, bad)
    elif suffix in (".parquet", ".arrow"):
        yield from rows_of_file(path, suffix)
    else:
        raise UserError(
            f"{path}: unknown table format `{path.suffix}`", f"use one of {', '.join(TABLE_SUFFIXES)}"
        )


def rows_of_table(path: Path, bad: BadRows) -> Iterator[tuple[int, dict]]:
    """`read_rows`, by the library `datasets` where the file is in order: the same rows and line numbers."""
    suffix = suffix_of(path)
    rows = None
    if suffix in (".csv", ".tsv") and not begins_too_long(path):
        rows = rows_in_order(path, suffix, header_of(path))
    return read_rows(path, bad) if rows is None else iter(rows)


def begins_too_long(path: Path) -> bool:
    """Whether the first row of a CSV file has more fields than its header.

    The library takes the first fields of such a file for row names, and all columns shift. It refuses a row
    that is too long further down.
    """
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    with open_text(path) as stream:
        found = csv.reader(stream, delimiter=delimiter)
        rows = (row for row in found if len(row) > 1 or "".join(row).strip())  # blank lines do not count
        try:
            header, first = next(rows, []), next(rows, [])
        except csv.Error:
            return True
    return len(first) > len(header)


def _read_delimited(path: Path, bad: BadRows, delimiter: str) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(1 << 28)
    with open_text(path) as stream:
        lines = itertools.chain(stream, [_END])
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL)
        try:
            header = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}, line 1: {error}", "check the header of the file") from None
        if not header or header == [_END]:
            raise UserError(f"{path}: the file is empty", "a header line with the column names is expected")
        header = [name.strip() for name in header]
        while True:
            start = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                bad.report(path, reader.line_num, "(row)", str(error), "not valid CSV")
                continue
            if row is None or row == [_END]:
                return
            if not row:
                continue
            if row[-1].endswith(_END):
                raise UserError(
                    f'{path.name}, line {start}: a cell opens a quote (") that is never closed, so all lines '
                    "from there on would be one cell",
                    'close the quote; a quote inside of a cell is written as "" in a cell in quotes',
                )
            if len(row) != len(header):
                bad.report(
                    path,
                    reader.line_num,
                    "(row)",
                    f"{len(row)} fields where the header has {len(header)}",
                    "wrong number of fields",
                )
                continue
            yield reader.line_num, dict(zip(header, row))


def _read_json_lines(path: Path, bad: BadRows) -> Iterator[tuple[int, dict]]:
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                bad.report(path, number, "(row)", f"not valid JSON ({error})", "not valid JSON")
                continue
            if not isinstance(row, dict):
                bad.report(
                    path,
                    number,
                    "(row)",
                    f"a JSON object is expected, found {type(row).__name__}",
                    "not a JSON object",
                )
                continue
            yield number, row


def _read_json(path: Path, bad: BadRows) -> Iterator[tuple[int, dict]]:
    """Reads a list of objects, or one object per line, as the published Amazon files have it."""
    with open_text(path) as stream:
        first = stream.read(1)
        while first.isspace():
            first = stream.read(1)
    if first != "[":
        yield from _read_json_lines(path, bad)
        return
    with open_text(path) as stream:
        try:
            rows = json.load(stream)
        except ValueError as error:
            raise UserError(
                f"{path}: not valid JSON: {error}", "write a list of objects, or one object per line (.jsonl)"
            ) from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            bad.report(
                path,
                number,
                "(row)",
                f"a JSON object is expected, found {type(row).__name__}",
                "not a JSON object",
            )
            continue
        yield number, row


def header_of(path: Path, delimiter: str | None = None) -> list[str]:
    """Returns the column names of a table file; of JSON those of its first `KEY_ROWS` rows.

    An object may lack a key that others have: products without a brand, for example.
    """
    require_file(path, "data.path")
    if suffix_of(path) in (".parquet", ".arrow"):
        return columns_of_file(path, suffix_of(path))
    if suffix_of(path) in (".csv", ".tsv") or delimiter:
        with open_text(path) as stream:
            header = next(
                csv.reader(stream, delimiter=delimiter or ("\t" if suffix_of(path) == ".tsv" else ",")), None
            )
        if not header:
            raise UserError(f"{path}: the file is empty", "a header line with the column names is expected")
        return [name.strip() for name in header]
    keys: dict[str, None] = {}  # a set in the order of their first appearance
    for _, row in itertools.islice(read_rows(path, BadRows(skip=True)), KEY_ROWS):
        keys.update(dict.fromkeys(row))
    if keys:
        return list(keys)
    raise UserError(f"{path}: the file holds no row", "at least one JSON object is expected")


def pick_column(
    path: Path,
    header: list[str],
    role: str,
    aliases: tuple[str, ...],
    renamed: dict[str, str],
    required: bool = True,
) -> str | None:
    """Returns the column that plays `role`.

    It is data.columns.<role> where that is given, else the first alias that is there.

    Args:
        renamed: `data.columns`. A caller with several files leaves those names out that another file has.

    Raises:
        UserError: the named column is not there, or none of the aliases is and the role is required.
    """
    if role in renamed:
        if renamed[role] in header:
            return renamed[role]
        raise UserError(
            f"data.columns.{role}={renamed[role]}: {path.name} has no such column; it has "
            f"{', '.join(header)}",
            nearest(renamed[role], header),
        )
    lowered = {name.lower(): name for name in reversed(header)}
    for alias in aliases:
        if alias.lower() in lowered:
            return lowered[alias.lower()]
    if required:
        raise UserError(
            f"{path.name}: missing column for `{role}`; it has {', '.join(header)}",
            f"name it one of {', '.join(aliases)}, or set data.columns.{role}=<column>",
        )
    return None


def require_columns(
    path: Path, header: list[str], roles: dict[str, tuple[str, ...]], renamed: dict[str, str]
) -> None:
    """Checks the columns that a file must have, all of them at once.

    Args:
        roles: role -> the names under which it is recognised.
        renamed: `data.columns`; a role that is named there is left to `pick_column`.

    Raises:
        UserError: two or more roles have no column. It names all of them, so that one correction is enough.
            A single one is left to `pick_column`.
    """
    there = {name.lower() for name in header}
    missing = [
        role
        for role, aliases in roles.items()
        if role not in renamed and not any(alias.lower() in there for alias in aliases)
    ]
    if len(missing) < 2:
        return
    example = ", ".join(f"{role}: <column>" for role in missing)
    raise UserError(
        f"{path.name}: missing columns for {', '.join(f'`{role}`' for role in missing)}; it has "
        f"{', '.join(header)}",
        f'give your names of them, in quotes on a command line: "data.columns={{{example}}}"',
    )
