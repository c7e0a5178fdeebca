"""Rows of parquet, CSV and Arrow files and of data sets of the hub, read by the library `datasets`.

A row number counts the rows of one file, or of one split of a data set, from 1. JSON Lines are read line by
line (_rows.py), because a broken line can then be named and left out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gdrt_ds.data.readers._rows import header_of
from gdrt_ds.errors import UserError
from gdrt_ds.files import cache_folder

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
"""Suffix of a file -> the builder of `datasets` that reads it."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def is_hub_name(path: str) -> bool:
    """Whether `data.path` reads like `owner/name` or `owner/name:config`."""
    return HUB_NAME.fullmatch(path) is not None


def rows_of_file(path: Path, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number, row) of a local file.

    Args:
        suffix: of the file without `.gz`.

    Raises:
        UserError: the file cannot be read.
    """
    options: dict[str, Any] = {}
    if BUILDERS[suffix] == "csv":
        options = texts_only(path, "\t" if suffix == ".tsv" else ",")
    fix = "check that the file is complete, and that all its rows have the columns of its header"
    with _words(f"{path}: cannot be read", fix):
        table = _load(BUILDERS[suffix], data_files=str(path), split="train", **options)
        for number, row in enumerate(table, start=1):
            gaps = ("",) if options else ()  # an empty cell of a CSV file is no value
            yield number, {k: v for k, v in row.items() if v is not None and v not in gaps}


def texts_only(path: Path, separator: str) -> dict[str, Any]:
    """Options of the CSV builder under which texts stay texts: "007" is no number and "NA" is no gap."""
    from datasets import Features, Value

    features = Features({name: Value("string") for name in header_of(path, separator)})
    return {"features": features, "keep_default_na": False, "sep": separator}


def rows_of_hub(name: str, revision: str | None) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yields (split, row number, row) of a data set of the hub.

    Args:
        name: owner/name, or owner/name:config.
        revision: branch, tag or commit; None is the newest.

    Raises:
        UserError: there is no such data set, or no network.
    """
    repository, _, part = name.partition(":")
    fix = (
        "check the name and the network (HF_HUB_OFFLINE=1 forbids it), or download the data set and give its "
        "folder as data.path"
    )
    with _words(f"data.path={name}: no such file or folder, and the hub does not give it", fix):
        splits = _load(repository, part or None, revision=revision)
        for split, table in splits.items():
            for number, row in enumerate(table, start=1):
                yield str(split), number, {key: value for key, value in row.items() if value is not None}


def _load(*given: Any, **options: Any) -> Any:
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
def _words(problem: str, fix: str) -> Iterator[None]:
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
