"""Our modules are found whatever the working folder holds; gdrt-train tells the launcher's words apart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gdrt_ds.commands.train import launch_command, needs_launcher, split_words
from gdrt_ds.errors import UserError
from gdrt_ds.files import REPOSITORY, preset_path
from gdrt_ds.invocation import module_command, put_own_packages_first


def test_the_launchers_words_end_where_the_trainings_begin():
    launcher = ["--num_gpus", "2", "--launcher_args=-x A=1"]
    training = ["--config", "c.yaml", "dro.tau=0.5", "--plan"]
    assert split_words([*launcher, *training]) == (launcher, training)
    assert split_words(["objective=sft"]) == ([], ["objective=sft"])
    assert split_words(["--hostfile", "hosts"]) == (["--hostfile", "hosts"], [])
    words = launch_command(launcher, training)[3:]
    assert words[2:] == [*launcher, "--module", "gdrt_ds.train", *training]


def test_jobs_side_by_side_on_a_machine_get_a_port_each_and_a_named_port_stays():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        first = launch_command(["--num_gpus", "2"], [])
        assert first[3] == "--master_port" and int(first[4]) != other.getsockname()[1]
    assert int(first[4]) != 29500
    for named in (["--master_port", "4000"], ["--master_port=4000"], ["--hostfile", "hosts"]):
        assert launch_command(named, [])[3 : 3 + len(named)] == named


def test_a_launchers_option_behind_them_is_refused_with_the_order():
    with pytest.raises(UserError, match="--num_gpus is not an option of the training") as caught:
        split_words(["--config", "c.yaml", "--num_gpus", "2"])
    assert "gdrt-train --num_gpus 2 --config" in caught.value.fix


def test_a_rank_of_another_launcher_and_a_plan_start_no_ranks(monkeypatch):
    assert needs_launcher(["--num_gpus", "2"], [])
    assert not needs_launcher([], ["--plan"])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not needs_launcher([], ["--config", "c.yaml"])


def test_a_working_folder_that_pythonpath_names_stands_behind_our_packages(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    put_own_packages_first()
    assert sys.path.count(str(tmp_path)) == 1 and sys.path[-1] == str(tmp_path)
    monkeypatch.delenv("PYTHONPATH")
    put_own_packages_first()
    assert str(tmp_path) not in sys.path and "" not in sys.path


def test_a_module_that_is_started_is_ours_in_a_folder_with_an_eval(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").write_text("raise SystemExit('theirs')\n")
    done = subprocess.run(
        [*module_command("eval.run"), "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert str(REPOSITORY / "eval") in done.stdout, done.stderr


def test_the_users_own_file_stands_before_a_preset_and_presets_are_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert preset_path("ds_configs/zero3.json") == REPOSITORY / "ds_configs" / "zero3.json"
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text("{}")
    assert preset_path("ds_configs/zero3.json").read_text() == "{}"
    assert preset_path("nowhere.json") == Path("nowhere.json")
