"""Settings that the data have no use for are told by name and value; those that are used are not."""

from __future__ import annotations

import json

import pytest

from gdrt_ds.config import DataSection, load_config
from gdrt_ds.data.corpus import load_corpus
from gdrt_ds.data.sources import read_source
from tests.data.sft_files import rows, write_lines, write_splits
from tests.data.test_corpus import section, write_table, write_windows

HALVES = (0.5, 0.25, 0.25)


def told(data: DataSection) -> dict[str, str]:
    """Setting -> its value and the reason, of the notes about settings that are not used."""
    notes = [note for note in load_corpus(data).notes if " is not used: " in note]
    return dict(note.removeprefix("data.").split(" = ", 1) for note in notes)


def test_windows_tell_the_settings_of_interactions(tmp_path):
    write_windows(tmp_path, valid=['9,"[4, 1]",5'])
    given = section(tmp_path, kcore=50, min_rating=4, split="leave_one_out", split_ratio=HALVES)
    found = told(given)
    assert list(found) == ["kcore", "min_rating", "split", "split_ratio"]
    assert found["kcore"] == "50 is not used: the windows and their splits are ready-made"
    (tmp_path / "valid.csv").unlink()  # the shares then cut valid from train
    assert list(told(section(tmp_path, split_ratio=HALVES))) == []
    assert list(told(section(tmp_path, columns={"rating": "stars", "title": "label"}))) == [
        "columns.rating",
        "columns.title",
    ]


def test_windows_use_the_columns_of_their_item_table(tmp_path):
    write_windows(tmp_path)
    (tmp_path / "id2name4Rec.json").unlink()
    titles = [{"asin": place, "label": f"Item {place}"} for place in range(1, 5)]
    (tmp_path / "table.json").write_text(json.dumps(titles))
    columns = {"item": "asin", "title": "label"}
    assert told(section(tmp_path, items=str(tmp_path / "table.json"), columns=columns)) == {}


def test_embedded_data_tell_files_and_columns():
    found = told(
        DataSection(path="planted", items="/none", users="/none", columns={"item": "x"}, revision="v1")
    )
    assert list(found) == ["revision", "items", "users", "columns.item"]
    provider = "film.film.directed_by"
    given = DataSection(
        path="ml-100k", users="/none", columns={"item": "x", "provider": provider}, planted={"num_items": 9}
    )
    assert list(told(given)) == ["users", "planted", "columns.item"]
    assert told(DataSection(path="planted", planted={"num_train": 90}, history_length=3)) == {}


def test_a_log_tells_shares_that_its_split_does_not_have(tmp_path):
    log = ["a,1,10,5", "a,2,20,4", "b,2,15,1", "a,3,30,5", "b,3,25,4", "b,1,40,5", "a,1,50,5", "b,2,55,5"]
    write_table(tmp_path, log)
    used = {"columns": {"item": "item_id", "title": "title"}, "items": str(tmp_path / "items.csv")}
    assert told(section(tmp_path, split_ratio=HALVES, min_rating=1, **used)) == {}
    found = told(section(tmp_path, split="leave_one_out", split_ratio=HALVES, planted={"seed": 1}, **used))
    assert list(found) == ["split_ratio", "planted"]


@pytest.mark.parametrize("divided", [True, False])
def test_rows_tell_the_settings_of_items_and_histories(tmp_path, divided):
    path = write_splits(tmp_path, (8, 4, 4)) if divided else write_lines(tmp_path / "rows.jsonl", rows(16))
    given = ["data.kcore=5", "data.items=/none", "data.history_length=3", "data.split_ratio=[0.5,0.25,0.25]"]
    config = load_config(None, [f"data.path={path}", "data.format=sft", "groups.by=label", *given])
    notes = [note for note in read_source(config).rows.notes if " is not used: " in note]
    found = [note.removeprefix("data.").split(" = ", 1)[0] for note in notes]
    assert found == ["items", "history_length", "kcore", *(["split_ratio"] if divided else [])]


def test_a_saved_config_which_names_every_setting_tells_nothing():
    given = DataSection(**DataSection(path="planted").model_dump())
    assert given.model_fields_set == set(DataSection.model_fields) and told(given) == {}
