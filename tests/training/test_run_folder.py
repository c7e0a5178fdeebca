"""Who may write into a run folder, what an overwrite and a failed start leave, and the words for failures of
the machine.
"""

import errno

import pytest
import torch
import yaml

from gdrt_ds.config import RunConfig, load_config
from gdrt_ds.errors import LostPeer, StorageError, UserError
from gdrt_ds.files import read_summary
from gdrt_ds.runtime import explain, single_process_runtime
from gdrt_ds.training import run_folder
from gdrt_ds.training.job import last_word, open_job, stop_if_asked
from gdrt_ds.training.run import run_training


def config(folder, **changes) -> RunConfig:
    return RunConfig.model_validate(
        {"run": {"dir": str(folder), "overwrite": changes.pop("overwrite", False)}, **changes}
    )


@pytest.fixture
def run(tmp_path):
    """A finished run."""
    folder = run_folder.claim(config(tmp_path / "run"))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    run_folder.write_summary(folder, "completed", step=1)
    return folder


def test_a_folder_with_a_run_is_taken_only_with_resume_or_overwrite(run):
    with pytest.raises(UserError, match="status: completed"):
        run_folder.claim(config(run))
    assert run_folder.claim(config(run, resume="auto")) == run


@pytest.mark.parametrize("content", [b'{"status": "comp', b"\xff\xfe", b"[]"])
def test_a_damaged_summary_is_named_and_may_be_overwritten(run, content):
    (run / "summary.json").write_bytes(content)
    with pytest.raises(UserError, match=r"summary\.json is damaged") as error:
        run_folder.status(run)
    assert "resume=auto" in error.value.fix
    run_folder.claim(config(run, overwrite=True))
    assert run_folder.status(run) is None


def test_a_finished_run_is_not_passed_off_as_one_with_other_settings_or_from_a_checkpoint(run):
    runtime = single_process_runtime()
    assert run_training(config(run, resume="auto"), runtime) == 0
    with pytest.raises(UserError, match=r"dro\.tau: 1\.0 -> 2\.0"):
        run_training(config(run, resume="auto", dro={"tau": 2.0}), runtime)
    with pytest.raises(UserError, match="resume = step_1: .* is a finished run") as error:
        run_training(config(run, resume="step_1"), runtime)
    assert "new run.dir" in error.value.fix


def test_what_lay_in_a_run_that_goes_on_stays_when_the_start_fails(tmp_path):
    folder = tmp_path / "run"
    run_folder.claim(config(folder))
    (folder / "slurm-123.out").write_text("log")
    job = open_job(config(folder, resume="auto"), single_process_runtime())
    with pytest.raises(UserError), last_word(job):
        raise UserError("no space", "make some")
    assert (folder / "slurm-123.out").read_text() == "log" and (folder / "config.yaml").is_file()
    assert run_folder.status(folder) == "failed"


def test_a_stop_before_training_says_the_step_of_the_newest_checkpoint(tmp_path, monkeypatch):
    job = open_job(config(tmp_path / "run"), single_process_runtime())
    monkeypatch.setattr("gdrt_ds.training.job.newest_step", lambda folder: 7)
    monkeypatch.setattr("gdrt_ds.training.job.ignore_stop_signals", lambda: None)
    stop_if_asked(job)  # nobody asked
    job.runtime.stop_signal = 15
    with pytest.raises(SystemExit):
        stop_if_asked(job)
    assert read_summary(tmp_path / "run")["step"] == 7


def test_the_models_that_a_plan_makes_are_no_foreign_files(tmp_path):
    for name in ("base", "base.lock", "base_plain", "base_plain.lock"):
        (tmp_path / name).mkdir()
    run_folder.claim(config(tmp_path))


def test_a_config_that_is_no_yaml_is_refused_in_words(run):
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml: not valid YAML"):
        run_folder.claim(config(run, resume="auto"))


def test_resuming_names_the_settings_that_differ_and_allows_those_that_compute_nothing(run):
    with pytest.raises(UserError, match=r"dro\.tau: 1\.0 -> 2\.0"):
        run_folder.claim(config(run, resume="auto", dro={"tau": 2.0}))
    run_folder.claim(config(run, resume="auto", train={"log_every": 3, "save_every": 7, "timeout_s": 30}))


def test_an_overwritten_run_comes_back_when_the_new_start_fails_before_it_computes(run):
    run_folder.claim(config(run, overwrite=True))
    assert not (run / "metrics.jsonl").exists()
    assert run_folder.release(run) is True
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights" and run_folder.status(
        run
    ) == "completed"
    assert not (run / run_folder.ASIDE).exists()


def test_an_overwrite_that_was_killed_before_it_trained_does_not_take_the_old_run_with_it(run):
    run_folder.claim(config(run, overwrite=True))
    (run / "catalogue.jsonl").write_text("half of the new run")
    run_folder.claim(config(run, overwrite=True, train={"seed": 5}))
    assert not (run / "catalogue.jsonl").exists()
    run_folder.release(run)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == b"weights"


def test_an_overwritten_run_is_gone_once_the_new_one_trains(run):
    run_folder.claim(config(run, overwrite=True))
    run_folder.settle(run)
    (run / "metrics.jsonl").write_text("")
    assert (
        run_folder.release(run) is False
        and not (run / "adapter").exists()
        and (run / "config.yaml").is_file()
    )


def test_checkpoints_on_another_disk_stay_there_when_a_run_is_overwritten(tmp_path):
    """RUN/checkpoints is a link that a user made: the new run writes through it, and the old run's
    checkpoints come back or are gone like its other files."""
    disk = tmp_path / "disk"
    (disk / "step_4").mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(disk, target_is_directory=True)
    (run / "config.yaml").write_text("objective: sft\n")
    run_folder.claim(config(run, overwrite=True))
    assert (run / "checkpoints").resolve() == disk.resolve() and not (disk / "step_4").exists()
    (disk / ".step_2.life_1").mkdir()
    assert run_folder.release(run) is False, "something of the new run is there"
    (disk / ".step_2.life_1").rmdir()
    assert run_folder.release(run) is True
    assert [p.name for p in disk.iterdir()] == ["step_4"]
    assert (run / "config.yaml").read_text() == "objective: sft\n"

    run_folder.claim(config(run, overwrite=True))
    (disk / "step_1").mkdir()
    run_folder.settle(run)
    assert [p.name for p in disk.iterdir()] == ["step_1"]
    assert (run / "checkpoints").is_symlink()


def test_a_failed_start_leaves_the_folder_free(tmp_path):
    folder = run_folder.claim(config(tmp_path / "new"))
    (folder / "base").mkdir()
    (folder / "life").write_text('{"life": 1}')
    assert run_folder.release(folder) is True
    assert [p.name for p in folder.iterdir()] == ["life"]
    assert run_folder.claim(config(folder, dro={"tau": 3.0})) == folder


def test_a_foreign_folder_is_never_emptied_and_an_empty_checkpoints_folder_is_not_foreign(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not a run"):
            run_folder.claim(config(tmp_path, overwrite=overwrite))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run_folder.claim(config(tmp_path / "run"))


def test_out_of_memory_names_what_to_change_on_gpu_and_host():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 9 bytes"
        ),
    ):
        told = explain(error, memory_fix="lower train.micro_batch")
        assert (
            told.status == 2 and "out of memory on" in told.problem and told.fix == "lower train.micro_batch"
        )
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert "the host" in explain(caught.value).problem


def test_a_full_disk_has_its_own_status_and_other_errors_stay_bugs(tmp_path):
    told = explain(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"))
    assert isinstance(told, StorageError) and told.status == 74 and "metrics.jsonl" in told.problem
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
    assert explain(RuntimeError("shape mismatch")) is None
    assert explain(RuntimeError("Connection closed by peer")) is None, (
        "without a process group there is no peer"
    )


def test_a_lost_peer_is_told_from_the_words_of_gloo(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for text in (
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5",
        "Timed out waiting 10000ms for recv operation to complete",
    ):
        told = explain(RuntimeError(text))
        assert isinstance(told, LostPeer) and told.status == 70 and "dead or hung" in told.problem


def test_a_setting_that_the_saved_run_did_not_have_counts_as_its_default(tmp_path):
    config = load_config(None, [f"run.dir={tmp_path}"])
    saved = config.model_dump(mode="json")
    del saved["data"]["windows"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    assert run_folder.changed_settings(tmp_path, config) == []
    growing = load_config(None, [f"run.dir={tmp_path}", "data.windows=growing"])
    assert run_folder.changed_settings(tmp_path, growing) == ["data.windows: 'sliding' -> 'growing'"]
