"""Which file of a folder of windows is trained on: never a held-out one, and a wrong name is answered."""

from __future__ import annotations

import json

import pytest

from gdrt_ds.data.corpus import load_corpus
from gdrt_ds.errors import UserError
from tests.data.test_corpus import section, write_table, write_windows


def test_a_folder_without_train_csv_is_answered_with_the_train_files_that_it_has(tmp_path):
    write_windows(tmp_path)
    (tmp_path / "train.csv").rename(tmp_path / "train_10000.csv")
    with pytest.raises(UserError, match="train.csv: no such file") as caught:
        load_corpus(section(tmp_path))
    assert caught.value.fix == "set data.train_file=train_10000.csv"


@pytest.mark.parametrize(
    "name, split", [("test.csv", "test"), ("valid.csv", "valid"), ("./link.csv", "test")]
)
def test_windows_that_are_held_out_are_never_the_train_file(tmp_path, name, split):
    write_windows(tmp_path, valid=['9,"[4, 1]",5'])
    (tmp_path / "link.csv").symlink_to(tmp_path / "test.csv")
    with pytest.raises(UserError, match=f"data.train_file = {name}: this is the file of the {split} windows"):
        load_corpus(section(tmp_path, train_file=name))


def test_held_out_windows_that_train_holds_too_are_told(tmp_path):
    write_windows(tmp_path, train=['7,"[1, 2, 3]",100', '8,"[2, 3, 1, 4]",101'], valid=['9,"[4, 1]",5'])
    notes = load_corpus(section(tmp_path)).notes
    told = [note for note in notes if "also windows of train" in note]
    assert len(told) == 1 and told[0].startswith("test: 1 of 1 windows")


@pytest.mark.parametrize("name, fix", [("test.csv", "{}"), ("train_9.csv", "{} data.train_file=train_9.csv")])
def test_one_file_of_a_folder_of_windows_is_answered_with_the_folder(tmp_path, name, fix):
    write_windows(tmp_path)
    (tmp_path / "train_9.csv").write_bytes((tmp_path / "train.csv").read_bytes())
    with pytest.raises(UserError, match="one file of a folder of windows") as caught:
        load_corpus(section(tmp_path / name))
    assert caught.value.fix == "set data.path=" + fix.format(tmp_path)


def test_a_train_file_that_the_format_does_not_have_is_told(tmp_path):
    notes = load_corpus(
        section(write_table(tmp_path), split_ratio=(0.5, 0.25, 0.25), train_file="train_1.csv")
    ).notes
    assert any("data.train_file = train_1.csv is not used" in note for note in notes)


@pytest.mark.parametrize("name", ["valid.jsonl", "validation.csv", "val.csv", "val.jsonl", "dev.csv"])
def test_every_name_of_the_valid_file_is_read(tmp_path, name):
    write_windows(tmp_path)
    row = {"user_id": 9, "item_ids": [4, 1], "timestamp": 5}
    text = json.dumps(row) if ".jsonl" in name else 'user_id,item_ids,timestamp\n9,"[4, 1]",5\n'
    (tmp_path / name).write_text(text)
    assert [sample.user_id for sample in load_corpus(section(tmp_path)).splits["valid"]] == ["9"]


def test_two_files_of_the_valid_split_are_refused(tmp_path):
    write_windows(tmp_path, valid=['9,"[4, 1]",5'])
    (tmp_path / "val.csv").write_bytes((tmp_path / "valid.csv").read_bytes())
    with pytest.raises(UserError, match="valid.csv and val.csv are both the valid split"):
        load_corpus(section(tmp_path))


PAIRS = {"user_id": 7, "item_ids": [1, 2, 3], "timestamp": 1}
TITLED = {
    "user_id": 7,
    "history_item_id": [1, 2],
    "history_item_title": ["A", "B"],
    "item_id": 3,
    "item_title": "C",
    "timestamp": 1,
}


@pytest.mark.parametrize("value", ["left out", None])
@pytest.mark.parametrize(
    ("good", "field"),
    [
        (PAIRS, "item_ids"),
        (PAIRS, "user_id"),
        (TITLED, "history_item_id"),
        (TITLED, "item_id"),
        (TITLED, "history_item_title"),
        (TITLED, "item_title"),
        (TITLED, "user_id"),
    ],
)
def test_a_row_of_json_that_lacks_a_key_is_a_bad_row(tmp_path, good, field, value):
    write_windows(tmp_path)
    (tmp_path / "train.csv").unlink()
    row = {**good, field: None}
    if value == "left out":
        del row[field]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [good, good, row]))
    with pytest.raises(UserError, match=f"train.jsonl, line 3, field `{field}`: "):
        load_corpus(section(tmp_path))
    corpus = load_corpus(section(tmp_path, on_bad_row="skip", split_ratio=(1, 0, 0)))
    assert len(corpus.splits["train"]) == 2
    assert any(": 1 (first: train.jsonl, line 3" in note for note in corpus.notes)


def test_a_row_of_json_without_a_time_or_a_label_stays(tmp_path):
    write_windows(tmp_path)
    (tmp_path / "train.csv").unlink()
    rows = [{**PAIRS, "kind": "x", "slot": 1}, {**PAIRS, "kind": None, "slot": 2}, {**PAIRS, "slot": ""}]
    del rows[2]["timestamp"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = load_corpus(section(tmp_path, split_ratio=(1, 0, 0))).splits["train"]
    assert [sample.timestamp for sample in train] == [1.0, 1.0, None]
    assert [sample.labels for sample in train] == [{"kind": "x", "slot": "1"}, {"slot": "2"}, {}]


HALF = "A \ud83d"


def test_half_of_a_character_in_a_title_is_a_bad_row(tmp_path):
    write_windows(tmp_path, names={"1": "One", "2": HALF, "3": "Three", "4": "Four"})
    with pytest.raises(UserError, match="id2name4Rec.json, field `2`: .* holds half of a character"):
        load_corpus(section(tmp_path))
    (tmp_path / "id2name4Rec.json").unlink()
    rows = [{"item_id": place, "title": title} for place, title in enumerate(["One", HALF], start=1)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="items.jsonl, line 2, field `title`: .* holds half of a character"):
        load_corpus(section(tmp_path))
    (tmp_path / "train.csv").unlink()
    for field, title in (("item_title", HALF), ("history_item_title", ["A", HALF])):
        (tmp_path / "train.jsonl").write_text(json.dumps({**TITLED, field: title}))
        with pytest.raises(UserError, match=f"train.jsonl, line 1, field `{field}`: .* half of a character"):
            load_corpus(section(tmp_path))
