"""A large log on disk as it is used: arrays that every process of a machine maps, and nobody builds twice.

Reading tens of millions of rows, sorting them and taking their digest takes minutes, so it is done once. The
folder's name is a fingerprint of the settings in `data` and of the files (place, size, time of change).

    $GDRT_CACHE/logs/KEY/    about.json, users.json, items.json, and one .npy for each column

Small logs are not kept: building them takes no longer than looking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdrt_ds.config import DataSection
from gdrt_ds.data.columns import EventTable, WindowTable
from gdrt_ds.data.kept import NotKept, digest_of, kept_folder, mapped, read_about, save_arrays, write_about
from gdrt_ds.data.popularity import count_items
from gdrt_ds.data.readers.base import Item, Names
from gdrt_ds.errors import UserError

VERSION = 2
"""Of the layout of the folders and of what is computed; another number finds no folder of this one."""
SMALLEST_BYTES = 16 << 20
"""Files that are smaller than this together are not kept."""


def kept_log(data: DataSection, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the fields of a `Corpus` from the cache, or builds them and keeps them there if they are large.

    Raises:
        UserError: what `build` raises.
    """
    files = _files(data)
    if sum(size for _, size, _ in files) < SMALLEST_BYTES:
        return build()
    key = digest_of(VERSION, data.model_dump(mode="json"), files)
    built: list[dict[str, Any]] = []

    def write(folder: Path) -> None:
        built.append(build())
        if not all(isinstance(samples, WindowTable) for samples in built[0]["splits"].values()):
            raise NotKept
        _save(built[0], folder)

    folder, problem = kept_folder("logs", key, write)
    if folder is None:
        fields = built[0] if built else build()
        if problem:
            fields["notes"].append(f"the log is not kept for other runs: {problem}")
        return fields
    if not built:
        fields = _load(folder)
        fields["notes"].append(f"the log is taken from the cache: {folder}")
        return fields
    built.clear()  # its arrays are in the folder now, and every process shares the pages of those
    return _load(folder)


def _files(data: DataSection) -> list[tuple[str, int, int]]:
    """(path, bytes, time of change) of all files that a reader may open: those of the folders concerned."""
    places = [Path(given) for given in (data.path, data.items, data.users) if given]
    folders = {place if place.is_dir() else place.parent for place in places if place.exists()}
    found = []
    for folder in sorted(folders):
        for path in sorted(folder.iterdir()):
            if path.is_file():
                state = path.stat()
                found.append((str(path.resolve()), state.st_size, state.st_mtime_ns))
    return found


def _save(fields: dict[str, Any], folder: Path) -> None:
    splits = fields["splits"]
    events = splits["train"].events
    save_arrays(
        folder,
        {
            "users": events.users,
            "items": events.items,
            "times": events.times,
            "names": events.user_names.data,
            "name_offsets": events.user_names.offsets,
        },
    )
    for split, windows in splits.items():
        save_arrays(folder, {f"{split}_ends": windows.ends, f"{split}_lengths": windows.lengths})
    write_about(folder, {key: asdict(item) for key, item in fields["items"].items()}, "items")
    write_about(folder, fields["users"], "users")
    write_about(
        folder,
        {
            **{name: fields[name] for name in ("name", "domain", "notes", "fingerprint")},
            "splits": list(splits),
            "item_ids": events.item_ids,
            "train_counts": count_items(splits["train"]),
        },
    )


def _load(folder: Path) -> dict[str, Any]:
    """The fields of a kept corpus.

    Raises:
        UserError: a file of the folder is missing or broken.
    """
    try:
        return _fields(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the cached log {folder} cannot be read ({error})", "delete that folder; it is built again"
        ) from None


def _fields(folder: Path) -> dict[str, Any]:
    about = read_about(folder)
    names = Names(mapped(folder, "names"), mapped(folder, "name_offsets"))
    columns = [mapped(folder, column) for column in ("users", "items", "times")]
    events = EventTable(*columns, names, about.pop("item_ids"))
    splits = {
        split: WindowTable(events, mapped(folder, f"{split}_ends"), mapped(folder, f"{split}_lengths"))
        for split in about.pop("splits")
    }
    items = {
        key: Item(**{**item, "genres": tuple(item["genres"])})
        for key, item in read_about(folder, "items").items()
    }
    counts = Counter(about.pop("train_counts"))
    users = read_about(folder, "users")
    return {**about, "items": items, "splits": splits, "users": users, "train_counts": counts}
