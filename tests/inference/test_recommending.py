"""Histories as people write them: titles that hold the separator, and names of items."""

from __future__ import annotations

from gdrt_ds.inference.recommending import parse_history


def test_a_title_that_holds_the_separator_is_kept_whole():
    known = {"Shine; a life", "Heat"}
    assert parse_history("Heat; Shine; a life;  Other ;", known) == ["Heat", "Shine; a life", "Other"]
    assert parse_history("Shine;a life;Heat", known) == ["Shine; a life", "Heat"]
    known = {"a;b", "Star Wars", "P ;q", "End;"}
    assert parse_history("a;b; Star Wars", known) == ["a;b", "Star Wars"]
    assert parse_history("Star Wars;P ;q;a;b; a", known) == ["Star Wars", "P ;q", "a;b", "a"]
    assert parse_history("End;; Star Wars", known) == ["End;", "Star Wars"]
