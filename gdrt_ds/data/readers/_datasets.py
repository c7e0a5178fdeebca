"""Rows of parquet, CSV and Arrow files, read by the library `datasets`.

A row number counts the rows of one file from 1. JSON Lines are read line by line (_rows.py), because a broken
line can then be named and left out. Data sets of the hub stand in _hub.py.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gdrt_ds.errors import UserError
from gdrt_ds.files import cache_folder

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
"""Suffix of a file -> the builder of `datasets` that reads it."""


def rows_of_file(
    path: Path, suffix: str, header: list[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number, row) of a local file, without a copy of it on disk.

    Args:
        suffix: of the file without `.gz`.
        header: names of the columns of a CSV file.

    Raises:
        UserError: the file cannot be read.
    """
    options = texts_only(header, "\t" if suffix == ".tsv" else ",") if header else {}
    fix = "check that the file is complete, and that all its rows have the columns of its header"
    number = 0
    with words(f"{path}: cannot be read", fix):
        table = _streamed(BUILDERS[suffix], path, **options)
        for batch in table.with_format("arrow").iter(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                # An empty cell of a CSV file is no value.
                yield number, {k: None if options and v == "" else v for k, v in row.items()}


def rows_in_order(path: Path, suffix: str, header: list[str]) -> list[tuple[int, dict[str, Any]]] | None:
    """Returns (line number, row) of a CSV file whose rows are one line each, with a value in the last column.

    None where it is not so: the library fills a row that is too short, and counts no lines, so a closer look
    is needed to name a row.
    """
    if len(set(header)) < len(header):
        return None
    try:
        rows = [row for _, row in rows_of_file(path, suffix, header)]
    except UserError:
        return None
    lines = sum(1 for _ in _lines(path))
    if len(rows) + 1 != lines or any(row[header[-1]] is None for row in rows):
        return None
    found = enumerate(rows, start=2)
    return [(line, {k: "" if v is None else v for k, v in row.items()}) for line, row in found]


def _lines(path: Path) -> Iterator[bytes]:
    opened = gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")
    with opened as stream:
        yield from stream


def columns_of_file(path: Path, suffix: str) -> list[str]:
    """Returns the names of the columns of a parquet or Arrow file.

    Raises:
        UserError: the file cannot be read.
    """
    with words(f"{path}: cannot be read", "check that the file is complete"):
        first = next(_streamed(BUILDERS[suffix], path).with_format("arrow").iter(batch_size=1), None)
    if first is None:
        raise UserError(f"{path}: the file holds no row", "at least one row is expected")
    return list(first.column_names)


def _streamed(builder: str, path: Path, **options: Any) -> Any:
    return load(builder, data_files=name_of(path), split="train", streaming=True, **options)


def name_of(path: Path) -> str:
    """A path as `data_files` wants it: the library takes `[`, `*` and `?` in it for a pattern."""
    return glob.escape(str(path.absolute()))


def texts_only(header: list[str], separator: str) -> dict[str, Any]:
    """Options of the CSV builder under which texts stay texts: "007" is no number and "NA" is no gap."""
    from datasets import Features, Value

    features = Features({name: Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "sep": separator}


def load(*given: Any, **options: Any) -> Any:
    with quietly() as datasets:
        return datasets.load_dataset(*given, cache_dir=str(cache_folder() / "datasets"), **options)


@contextlib.contextmanager
def quietly() -> Iterator[Any]:
    """Gives the library, which says nothing meanwhile: what goes wrong is told in our words."""
    import datasets

    before = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        datasets.utils.logging.set_verbosity(before)


@contextlib.contextmanager
def words(problem: str, fix: str) -> Iterator[None]:
    """Turns whatever the library raises into a UserError with the first line of its cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library, pandas, pyarrow and the hub each raise their own kinds
        cause: BaseException = error
        while cause.__cause__ is not None or cause.__context__ is not None:
            cause = cause.__cause__ or cause.__context__
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UserError(f"{problem}: {lines[0][:200]}", fix) from None
