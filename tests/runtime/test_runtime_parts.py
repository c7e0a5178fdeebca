"""Launchers, build folder and failures: what a process finds in its environment and what it ends with."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from gdrt_ds.errors import EXIT_INTERRUPTED, LostPeer, StorageError, UserError
from gdrt_ds.runtime import Runtime, detect_rank, explain, own_build_folder, report_user_errors
from gdrt_ds.runtime.build_folder import STALE_LOCK_S
from gdrt_ds.runtime.ranks import cpu_threads

TORCH = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
LAUNCHED = {
    "torchrun": {**TORCH, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"},
    "deepspeed": {**TORCH, "LOCAL_SIZE": "2"},
    "srun": {**SLURM, "SLURM_NNODES": "4"},
    "srun with our template's variables": {**SLURM, **TORCH, "LOCAL_WORLD_SIZE": "2"},
}


@pytest.fixture
def environment(monkeypatch):
    """A function that leaves only these variables of a launcher."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "LOCAL_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_every_launcher_gives_the_same_rank_in_its_own_variables(environment, launcher):
    environment(LAUNCHED[launcher])
    place = {"rank": 3, "local_rank": 1, "world": 8, "local_world": 2}
    assert detect_rank() == {**place, "launcher": launcher.split()[0]}


def test_a_process_without_a_launcher_is_alone_in_a_batch_step_of_one_task_too(environment):
    alone = {"rank": 0, "local_rank": 0, "world": 1, "local_world": 1, "launcher": "python"}
    assert detect_rank() == alone
    environment({**SLURM, "SLURM_NTASKS": "1"})
    assert detect_rank() == alone


def test_the_shell_of_an_interactive_allocation_is_no_rank(environment):
    shell = {**SLURM, "SLURM_PROCID": "0"}
    environment({**shell, "SLURM_STEP_ID": "4294967290"})
    assert detect_rank()["world"] == 1
    environment({**shell, "SLURM_STEP_NUM_TASKS": "1"})
    assert detect_rank()["world"] == 1
    environment({**SLURM, "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"})
    assert (detect_rank()["world"], detect_rank()["local_world"]) == (8, 4)


def test_the_ranks_of_a_machine_share_its_cores_unless_the_user_says_how_many(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [cpu_threads(ranks) for ranks in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert cpu_threads(2) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert cpu_threads(2) == 4
    for wrong in ("all", "0", "-1"):
        monkeypatch.setenv("OMP_NUM_THREADS", wrong)
        with pytest.raises(UserError, match="no number of threads"):
            cpu_threads(2)


@pytest.mark.parametrize("end", ["the build ends", "the lock gets old"])
def test_the_lock_of_a_killed_build_is_removed_and_that_of_a_running_one_is_named_and_waited_for(
    tmp_path, monkeypatch, capsys, end
):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    locks = {name: tmp_path / name / "lock" for name in ("killed", "running")}
    for lock in locks.values():
        lock.parent.mkdir()
        lock.touch()
    old = time.time() - STALE_LOCK_S - 60
    os.utime(locks["killed"], (old, old))
    waited = []

    def wait(seconds):
        waited.append(seconds)
        assert locks["running"].exists() and len(waited) <= 3
        if len(waited) == 3:
            if end == "the build ends":
                locks["running"].unlink()
            else:
                os.utime(locks["running"], (old, old))

    monkeypatch.setattr(time, "sleep", wait)
    own_build_folder()
    assert len(waited) == 3
    assert not locks["killed"].exists() and not locks["running"].exists()
    said = capsys.readouterr().err
    assert said.count(str(locks["running"])) == 1 and str(locks["killed"]) not in said
    locks["running"].touch()
    waited.clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    own_build_folder()
    assert len(waited) == 3 and not capsys.readouterr().err


def test_failures_of_the_machine_are_told_from_bugs():
    full = OSError(errno.ENOSPC, "No space left on device", "model.bin")
    assert isinstance(explain(full), StorageError)
    assert "model.bin cannot be written" in explain(full).problem
    memory = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), memory_fix="buy more")
    assert "on the GPU" in memory.problem
    assert memory.fix == "buy more"
    assert "on the host" in explain(RuntimeError("DefaultCPUAllocator: can't allocate memory")).problem
    mistake = UserError("a problem")
    assert explain(mistake) is mistake
    assert explain(OSError(errno.ENOENT, "No such file")) is None
    # Without a process group there is no peer whose connection could be closed.
    assert explain(RuntimeError("Connection closed by peer")) is None


@pytest.mark.parametrize(
    "error, status, told",
    [
        (
            UserError("a setting is wrong", "mend it"),
            UserError.status,
            "error: a setting is wrong\n  fix: mend",
        ),
        (LostPeer("a peer is gone"), LostPeer.status, "error: a peer is gone"),
        (
            OSError(errno.ENOSPC, "full"),
            StorageError.status,
            "error: rank 0: a file cannot be written (full)",
        ),
        (KeyboardInterrupt(), 128 + signal.SIGINT, "interrupted: half is saved\n"),
    ],
)
def test_a_failure_becomes_one_message_and_its_status(environment, capsys, error, status, told):
    with pytest.raises(SystemExit) as ended, report_user_errors(interrupted="half is saved"):
        raise error
    assert ended.value.code == status
    assert capsys.readouterr().err.startswith(told)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), report_user_errors():
        _ = 1 / 0


def test_the_statuses_are_the_ones_that_schedulers_and_users_rely_on():
    statuses = [UserError.status, LostPeer.status, StorageError.status, EXIT_INTERRUPTED]
    assert statuses == [2, 70, 74, 75]


def test_the_slurm_scripts_read_the_statuses_without_importing_torch():
    code = "import sys; sys.path.insert(0, 'slurm'); import lives; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


@pytest.mark.parametrize("world, waits", [(1, 0), (2, 1)])
def test_a_rank_alone_waits_for_nobody(monkeypatch, world, waits):
    """A barrier of one rank says nothing and makes NCCL warn that it guesses a device."""
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: calls.append(1))
    Runtime(world=world).barrier()
    assert len(calls) == waits


@pytest.mark.parametrize(
    "world, words", [(1, "this process hangs, or its machine"), (2, "a peer is dead or hung")]
)
def test_a_rank_that_stopped_moving_ends_with_words_and_stacks(tmp_path, world, words):
    program = f"""
import sys, time
from gdrt_ds.runtime.ranks import Runtime
from gdrt_ds.runtime.watchdog import Watchdog
with Watchdog(Runtime(world={world}), sys.argv[1], timeout_s=1):
    time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 70
    assert words in done.stderr and "fix: resume=auto" in done.stderr
    stacks = (tmp_path / "stacks_rank_0.txt").read_text(encoding="utf-8")
    assert words in stacks and "time.sleep" not in stacks and 'File "<string>", line' in stacks
