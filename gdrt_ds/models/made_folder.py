"""A folder that several processes ask for, and that one of them makes: whole, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdrt_ds.errors import UserError
from gdrt_ds.files import process_lock, replacing


def make_once(
    folder: Path, marker: str, recipe: dict[str, Any], fill: Callable[[Path], None], other: UserError
) -> Path:
    """Makes a folder if it is not there yet; processes that come later wait and take it.

    Args:
        marker: name of the file in it that says from what it was made.
        recipe: what it is made from; JSON.
        fill: writes into an empty folder, which then takes the place of `folder`.
        other: raised if the folder holds anything else.

    Raises:
        UserError: `other`.
        OSError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with process_lock(folder.with_name(folder.name + ".lock")):
        if (folder / marker).is_file():
            if json.loads((folder / marker).read_text(encoding="utf-8")) != recipe:
                raise other
            return folder
        if folder.exists() and any(folder.iterdir()):
            raise other
        with replacing(folder) as scratch:
            scratch.mkdir()
            fill(scratch)
            (scratch / marker).write_text(json.dumps(recipe), encoding="utf-8")
    return folder
