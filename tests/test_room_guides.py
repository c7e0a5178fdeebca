"""The guide at the head of a room names every file of it, so that a newcomer finds the one to change."""

from __future__ import annotations

import ast
import re

import pytest

from gdrt_ds.files import REPOSITORY

ENTRY = re.compile(r"^    ([a-z_0-9]+(?:\.py|/)) +\S", re.MULTILINE)
ROOMS = ("data", "models", "training", "planning", "studies", "inference", "serving", "runtime", "commands")


def guide_of(room: str) -> set[str]:
    """File and folder names in the docstring of a room's __init__.py."""
    text = (REPOSITORY / "gdrt_ds" / room / "__init__.py").read_text(encoding="utf-8")
    return set(ENTRY.findall(ast.get_docstring(ast.parse(text), clean=False) or ""))


def content_of(room: str) -> set[str]:
    folder = REPOSITORY / "gdrt_ds" / room
    files = {path.name for path in folder.glob("*.py") if path.name != "__init__.py"}
    return files | {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}


@pytest.mark.parametrize("room", ROOMS)
def test_the_guide_of_a_room_names_what_is_in_it(room):
    assert guide_of(room) == content_of(room)
