"""Histories as people write them: titles that hold the separator, and names of items."""

from __future__ import annotations

import json
import os

import pytest

from gdrt_ds.data.catalogue import CatalogueEntry
from gdrt_ds.errors import UserError
from gdrt_ds.inference.recommending import (
    KnownTitles,
    histories_of,
    history_lines,
    parse_history,
    read_histories,
    texts_of_names,
)
from gdrt_ds.recommend import print_json


def test_a_title_that_holds_the_separator_is_kept_whole():
    known = {"Shine; a life", "Heat"}
    assert parse_history("Heat; Shine; a life;  Other ;", known) == ["Heat", "Shine; a life", "Other"]
    assert parse_history("Shine;a life;Heat", known) == ["Shine; a life", "Heat"]
    known = {"a;b", "Star Wars", "P ;q", "End;"}
    assert parse_history("a;b; Star Wars", known) == ["a;b", "Star Wars"]
    assert parse_history("Star Wars;P ;q;a;b; a", known) == ["Star Wars", "P ;q", "a;b", "a"]
    assert parse_history("End;; Star Wars", known) == ["End;", "Star Wars"]


class CountedLooks(set):
    """A set that counts how often it is asked whether it has a title."""

    looks = 0

    def __contains__(self, title):
        self.looks += 1
        return super().__contains__(title)


def test_a_long_history_is_parsed_in_a_time_that_grows_with_its_length():
    known = CountedLooks({"Shine; a life", "Heat"})
    line = "; ".join(["Nobody knows it", "Shine; a life"] * 1000)
    assert parse_history(line, known) == ["Nobody knows it", "Shine; a life"] * 1000
    assert known.looks <= 4 * 3000
    assert KnownTitles(ENTRIES).most_parts == 2


def test_json_holds_minus_infinity_as_null(capsys):
    row = {"rank": 1, "item_id": "1", "title": "Heat", "log_prob": -float("inf"), "probability": 0.0}
    print_json(["Heat"], [], 0, [row])
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert answer["recommendations"] == [{**row, "log_prob": None}]


ENTRIES = [
    CatalogueEntry("1", ["1", "2"], "<a_1><b_2>", 3, name="Heat (1995) / Alien (1979)"),
    CatalogueEntry("3", ["3"], "<a_2><b_1>", 3, name="Up (2009)"),
    CatalogueEntry("4", ["4", "5"], "<a_3><b_1>", 3, name="Face / Off / Shine; a life"),
    CatalogueEntry("6", ["6"], "<a_4><b_1>", 3, name="Out / In"),
]


@pytest.mark.parametrize(
    "name, text",
    [
        ("Heat (1995)", "<a_1><b_2>"),
        ("Alien (1979)", "<a_1><b_2>"),
        ("Heat (1995) / Alien (1979)", "<a_1><b_2>"),
        ("Up (2009)", "<a_2><b_1>"),
        ("Face / Off", "<a_3><b_1>"),
        ("Out / In", "<a_4><b_1>"),
        ("<a_2><b_1>", "<a_2><b_1>"),
        ("In", "In"),  # a part of the name of one item is no name
        ("Heat", "Heat"),
    ],
)
def test_every_name_of_merged_items_stands_for_their_text(name, text):
    assert texts_of_names([name, "Up (2009)"], ENTRIES) == [text, "<a_2><b_1>"]
    assert (name in KnownTitles(ENTRIES)) == (text.startswith("<a_"))


def test_a_name_of_merged_items_that_holds_the_separator_is_kept_whole():
    known = KnownTitles(ENTRIES)
    assert parse_history("Up (2009); Shine; a life;Alien (1979)", known) == [
        "Up (2009)",
        "Shine; a life",
        "Alien (1979)",
    ]


def test_a_name_of_items_with_different_texts_is_refused_unless_it_is_the_whole_name_of_one():
    other = CatalogueEntry("7", ["7", "8"], "<a_9>", 1, name="Alien (1979) / Up (2009)")
    with pytest.raises(UserError, match="'Alien .1979.', and 2 items with different texts") as error:
        texts_of_names(["Alien (1979)"], [*ENTRIES, other])
    assert "'<a_1><b_2>', '<a_9>'" in error.value.fix
    assert texts_of_names(["Up (2009)"], [*ENTRIES, other]) == ["<a_2><b_1>"]
    twin = CatalogueEntry("9", ["9"], "<a_8>", 1, name="Up (2009)")
    with pytest.raises(UserError, match="2 items with different texts"):
        texts_of_names(["Up (2009)"], [*ENTRIES, twin])


def test_a_file_of_histories_may_be_a_pipe_and_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "histories.txt"
    file.write_bytes("\ufeffHeat; Up\r\n\r\nUp\u2028 and away\r\n".encode())
    assert read_histories(None, str(file), set()) == [["Heat", "Up"], ["Up\u2028 and away"]]
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        stream.write("Heat; Up\n")
    try:
        lines = history_lines(None, f"/dev/fd/{reading}")
    finally:
        os.close(reading)
    # Read before the model is loaded, and parsed once more with its titles.
    assert histories_of(lines, set()) == [["Heat", "Up"]]
    assert histories_of(lines, {"Heat; Up"}) == [["Heat; Up"]]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="empty.txt: no title found"):
        read_histories(None, str(tmp_path / "empty.txt"), set())
