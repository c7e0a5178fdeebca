"""A disk that fills while a run writes: a StorageError names the file to be written."""

from __future__ import annotations

import errno
import resource
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gdrt_ds.config import RunConfig
from gdrt_ds.dro.groups import GroupPlan
from gdrt_ds.errors import StorageError, UserError
from gdrt_ds.runtime import explain, single_process_runtime
from gdrt_ds.training import checkpoint, grouping, run_folder
from gdrt_ds.training.agreement import TAKEN_OVER, agree, attempt


@contextmanager
def room_of(num_bytes: int):
    """No file of this process can grow beyond `num_bytes`, as under a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def job_in(folder: Path, said: list[str]) -> SimpleNamespace:
    return SimpleNamespace(folder=folder, runtime=single_process_runtime(), say=said.append)


def test_groups_that_cannot_be_saved_are_a_storage_error(tmp_path):
    store = SimpleNamespace(offsets=np.arange(5000), target_offsets=np.arange(5000), rows_change=False)
    grouped = SimpleNamespace(
        plan=GroupPlan(by="position", num=2),
        groups={"train": np.zeros(5000, np.int16)},
        scores=None,
    )
    prepared = SimpleNamespace(stores={"train": store})
    with room_of(1000), pytest.raises(StorageError, match="groups.safetensors was not published") as caught:
        grouping.save_groups(job_in(tmp_path, []), prepared, grouped)
    assert caught.value.status == 74 and "free disk space" in caught.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["groups.json"]


def test_a_cache_that_cannot_be_written_is_told_and_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("GDRT_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    with room_of(1000):
        grouping._keep_for_other_runs(job_in(tmp_path, said), "k" * 40, np.zeros(5000, np.float32))
    assert len(said) == 1 and "not kept for other runs" in said[0] and str(tmp_path / "cache") in said[0]


def test_the_probe_of_a_full_disk_does_not_stay_in_the_run_folder(tmp_path):
    config = RunConfig.model_validate({"run": {"dir": str(tmp_path / "run")}})
    with room_of(0), pytest.raises(UserError, match="not writable"):
        run_folder.claim(config)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_failed_copy_names_its_destination():
    error = OSError(
        errno.ENOSPC, "No space left on device", "/site-packages/zero_to_fp32.py", None, "/run/copy.py"
    )
    told = explain(error)
    assert isinstance(told, StorageError)
    assert "/run/copy.py cannot be written" in told.problem and "zero_to_fp32" not in told.problem

    def fail():
        raise error

    assert attempt(fail) == "OSError: /run/copy.py: No space left on device"


def test_scripts_that_deepspeed_cannot_copy_are_told_with_the_folder_they_go_to(tmp_path):
    from deepspeed import DeepSpeedEngine

    copy_scripts = DeepSpeedEngine._copy_recovery_script.__get__(DeepSpeedEngine.__new__(DeepSpeedEngine))
    with room_of(1000):
        problem = checkpoint._copied(copy_scripts, str(tmp_path))
    assert problem is not None and f"copied into {tmp_path}" in problem


def test_a_process_that_a_newer_start_has_overtaken_is_told_to_stop(tmp_path):
    def overtaken():
        raise UserError(f"RUN {TAKEN_OVER} start number 2", "stop")

    engine = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(UserError) as caught:
        agree(engine, attempt(overtaken), tmp_path / ".step_3.life_1")
    assert caught.value.fix == "stop this process; the newer one goes on"


def test_an_adapter_that_is_broken_does_not_blame_the_disk(tmp_path):
    def broken():
        raise RuntimeError("3 adapter matrices hold NaN or infinity, e.g. lora_B")

    engine = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(UserError) as caught:
        agree(engine, attempt(broken), tmp_path / "scratch", what="adapter")
    assert not isinstance(caught.value, StorageError)
    assert "the disk is not the reason" in caught.value.fix and "lower train.lr" in caught.value.fix
