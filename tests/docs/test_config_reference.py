"""docs/config-reference.md says what the settings in gdrt_ds/config/ say, about every key."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from gdrt_ds.config import known_keys
from gdrt_ds.files import REPOSITORY
from gdrt_ds.registry import part_names

SCRIPT = REPOSITORY / "docs" / "make_reference.py"


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("make_reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_in_the_repository_is_current(reference):
    written = Path(reference.PAGE).read_text(encoding="utf-8")
    assert written == reference.page(), "run: python docs/make_reference.py"


def test_every_key_has_a_row_with_its_meaning(reference):
    page = reference.page()
    leaves = [key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())]
    assert len(leaves) > 80
    for key in leaves:
        row = next((line for line in page.splitlines() if line.startswith(f"| `{key}` |")), None)
        assert row is not None, key
        assert len(row.split(" | ")[-1].strip(" |")) > 10, row


def test_a_key_without_a_description_is_refused(reference):
    class Broken(BaseModel):
        """A section."""

        silent: int = Field(3)

    with pytest.raises(ValueError, match="broken.silent has no description"):
        reference.tables(Broken, "broken.", "broken")


def test_ranges_and_choices_are_told_in_words(reference):
    page = reference.page()
    assert "| `dro.alpha` | `0.5` | number; above 0.0; at most 1.0 |" in page or (
        "| `dro.alpha` | `0.5` | number; above 0; at most 1 |" in page
    )
    assert "`quantile`, `uniform`" in page


@pytest.mark.parametrize(
    "key, room, besides",
    [
        ("data.format", "gdrt_ds.data.readers", "auto"),
        ("model.quantization", "gdrt_ds.models.quantization", ""),
        ("model.attention", "gdrt_ds.models.attention", "auto"),
    ],
)
def test_a_setting_that_names_a_part_lists_the_files_of_its_room(reference, key, room, besides):
    row = next(line for line in reference.page().splitlines() if line.startswith(f"| `{key}` |"))
    allowed = row.split(" | ")[2].replace("`", "").split(", ")
    assert allowed == [name for name in (besides, *part_names(room)) if name]


@pytest.mark.slow
def test_the_table_of_sizes_is_what_the_memory_plan_says():
    script = REPOSITORY / "docs" / "make_size_table.py"
    spec = importlib.util.spec_from_file_location("make_size_table", script)
    sizes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sizes)
    written = Path(sizes.PAGE).read_text(encoding="utf-8")
    assert sizes.table() in written, "run: python docs/make_size_table.py"
