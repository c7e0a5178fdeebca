"""A folder that several processes ask for is made by one of them, and never in part."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from gdrt_ds.errors import UserError
from gdrt_ds.models.made_folder import make_once

OTHER = UserError("another one stands there", "take another folder")


def write(folder):
    (folder / "file").write_text(str(os.getpid()))


def make(folder, recipe=None, fill=write):
    return make_once(folder, "made.json", recipe or {"seed": 0}, fill, OTHER)


def test_of_processes_that_ask_at_once_one_makes_it_and_all_get_it(tmp_path):
    target = tmp_path / "deep" / "made"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make, args=(target,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert int((target / "file").read_text()) in {process.pid for process in processes}
    assert sorted(path.name for path in target.iterdir()) == ["file", "made.json"]


def test_the_second_call_takes_what_is_there(tmp_path):
    make(tmp_path / "made")
    assert make(tmp_path / "made", fill=lambda folder: pytest.fail("it was made twice")) == tmp_path / "made"


def test_one_of_another_recipe_and_a_folder_of_other_files_are_refused_and_kept(tmp_path):
    make(tmp_path / "made")
    with pytest.raises(UserError, match="another one"):
        make(tmp_path / "made", {"seed": 1})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="another one"):
        make(tmp_path / "foreign")
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "years of work"


def test_one_that_fails_leaves_nothing_behind_and_can_be_tried_again(tmp_path):
    def fails(folder):
        write(folder)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        make(tmp_path / "made", fill=fails)
    assert [path.name for path in tmp_path.iterdir()] == ["made.lock"]
    (tmp_path / "made").mkdir()  # an empty folder is no obstacle
    assert make(tmp_path / "made") == tmp_path / "made"
