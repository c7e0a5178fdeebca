"""For tests of "one new file": the example of the docs stands in a room, as if it had been put there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gdrt_ds import registry
from gdrt_ds.files import REPOSITORY

EXAMPLES = REPOSITORY / "docs" / "examples"


@contextmanager
def room_with(package: str, folder: Path) -> Iterator[None]:
    """The files of a folder stand in a room of the package."""
    room = importlib.import_module(package)
    added = [f"{package}.{path.stem}" for path in folder.glob("*.py")]
    room.__path__.append(str(folder))
    forget_parts()
    try:
        yield
    finally:
        room.__path__.remove(str(folder))
        for name in added:
            if sys.modules.pop(name, None) is not None:
                delattr(room, name.rpartition(".")[2])
        forget_parts()


def forget_parts() -> None:
    """The registry looks at the folders anew."""
    registry.part_names.cache_clear()
    registry.parts.cache_clear()
