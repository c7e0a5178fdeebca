"""A planted change is found by its words, whatever a formatter did to the lines."""

from __future__ import annotations

import pytest

from tests.planting_source import LostPlace, plant

SOURCE = """
def other():
    return add(1, 2)


class Sum:
    def total(self):
        return add(  # a comment
            1,
            2,
        )
"""


def test_a_change_is_found_across_lines_comments_and_trailing_commas():
    found = plant(SOURCE, "Sum.total", "return add(1, 2)", "return add(1, 3)")
    assert found.count("add(1, 3)") == 1 and "def other():\n    return add(1, 2)" in found


def test_a_text_that_occurs_twice_or_never_and_a_lost_function_are_told():
    with pytest.raises(LostPlace, match="2 places"):
        plant(SOURCE, "<module>", "add(1, 2)", "")
    with pytest.raises(LostPlace, match="0 places"):
        plant(SOURCE, "other", "add(2, 1)", "")
    with pytest.raises(LostPlace, match="no Sum.mean"):
        plant(SOURCE, "Sum.mean", "add", "")
