"""Which file of a folder of windows is trained on: never a held-out one, and a wrong name is answered."""

from __future__ import annotations

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
