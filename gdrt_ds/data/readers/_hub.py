"""Data sets of the Hugging Face hub, brought to this machine as files, which the readers of files then read.

A name is owner/name or owner/name:config, at `data.revision`. The library `datasets` loads it. Rows of prompt
and completion, and ready-made windows, become a folder with a parquet file for each split. A log has no
splits of its own: all of them become one table, as do the items that `data.items` names and the users of
`data.users`.

    $GDRT_CACHE/hub/KEY/    train.parquet, valid.parquet, test.parquet; or NAME.parquet
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gdrt_ds.config import DataSection
from gdrt_ds.data.kept import digest_of, kept_folder
from gdrt_ds.data.readers import windows
from gdrt_ds.data.readers._datasets import load, words
from gdrt_ds.data.readers.sft import SPLIT_NAMES
from gdrt_ds.data.text_rows import Columns
from gdrt_ds.errors import UserError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
FIX = (
    "check the name and the network (HF_HUB_OFFLINE=1 forbids it), or download the data set and give its "
    "folder as data.path"
)


def is_hub_name(path: str) -> bool:
    """Whether a path reads like `owner/name` or `owner/name:config`, and there is no folder `owner` here.

    With such a folder it is a path of this machine, perhaps a misspelt one, and nobody waits for the network.
    """
    return HUB_NAME.fullmatch(path) is not None and not Path(path).parent.is_dir()


def on_this_machine(data: DataSection) -> DataSection:
    """Returns the section with paths in the place of names of the hub.

    Raises:
        UserError: there is no such data set, or no network.
    """
    changed: dict[str, str] = {}
    if is_hub_name(data.path):
        changed["path"] = str(_files("data.path", data.path, data.revision, _divided(data)))
    for setting in ("items", "users"):
        name = getattr(data, setting)
        if name and is_hub_name(name):
            changed[setting] = str(_files(f"data.{setting}", name, data.revision, False))
    return data.model_copy(update=changed) if changed else data


def _divided(data: DataSection) -> bool | None:
    """Whether the splits of `data.path` stay apart; None = the columns tell."""
    return None if data.format == "auto" else data.format != "table"


@functools.lru_cache(maxsize=8)
def _files(setting: str, name: str, revision: str | None, divided: bool | None) -> Path:
    """The folder of the splits' files, or the one file of a table."""
    from gdrt_ds.runtime import detect_rank

    if detect_rank()["rank"] == 0:  # without a network the library gives up after half a minute only
        print(f"{setting}={name}: no path of this machine, so the Hugging Face hub is asked", flush=True)
    repository, _, part = name.partition(":")
    with words(f"{setting}={name}: no such file or folder, and the hub does not give it", FIX):
        splits = load(repository, part or None, revision=revision)
    columns = next(iter(splits.values())).column_names
    if divided is None:
        divided = _are_rows(columns) or _are_windows(columns)
    tables = _by_split(setting, name, splits) if divided else {repository.split("/")[1]: _joined(splits)}

    def write(folder: Path) -> None:
        for file, table in tables.items():
            table.to_parquet(str(folder / f"{file}.parquet"))

    key = digest_of(name, divided, {file: table._fingerprint for file, table in tables.items()})
    folder, problem = kept_folder("hub", key, write)
    if folder is None:
        raise UserError(f"{setting}={name}: {problem}", "set GDRT_CACHE to a folder that can be written")
    return folder if divided else folder / f"{repository.split('/')[1]}.parquet"


def _are_rows(columns: Iterable[str]) -> bool:
    return Columns({}).are_rows(columns)


def _are_windows(columns: Iterable[str]) -> bool:
    there = set(columns)
    names = (windows.WINDOW, windows.HISTORY, windows.HISTORY_TITLE)
    return any(name in there for group in names for name in group)


def _by_split(setting: str, name: str, splits: Any) -> dict[str, Any]:
    """train, valid and test, whatever the hub calls them; a split of another name is left out."""
    known = [split for split in splits if split in SPLIT_NAMES]
    found = {SPLIT_NAMES[split]: splits[split] for split in known}
    if len(found) < len(known):
        raise UserError(
            f"{setting}={name}: two of its splits are one of train, valid and test: {', '.join(known)}",
            "download the data set, keep one of them, and give its folder as data.path",
        )
    if "train" not in found:
        raise UserError(
            f"{setting}={name}: no split is named train; there are {', '.join(splits)}",
            "give another data set, or one of its configs as owner/name:config",
        )
    return found


def _joined(splits: Any) -> Any:
    from datasets import concatenate_datasets

    tables = list(splits.values())
    return tables[0] if len(tables) == 1 else concatenate_datasets(tables)
