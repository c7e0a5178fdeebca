"""The best validation: which checkpoint the adapter comes from at the end, and what a run takes over from
another one.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gdrt_ds.config import RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.runtime import single_process_runtime
from gdrt_ds.training import checkpoint, ending, lives, resuming
from gdrt_ds.training.validation import Best
from tests.training.test_checkpoint import publish


@pytest.fixture
def job(tmp_path):
    """A run folder with checkpoints of step 2, the best, and step 4."""
    run = tmp_path / "run"
    run.mkdir()
    lives.begin_life(run)
    publish(run, 2, best_step=2)
    publish(run, 4, best_step=2)
    said = []
    config = RunConfig.model_validate({"run": {"dir": str(run)}})
    runtime = single_process_runtime()
    return SimpleNamespace(folder=run, config=config, say=said.append, said=said, runtime=runtime)


@pytest.fixture
def restored(monkeypatch):
    """Steps of the checkpoints that were put into the engine."""
    steps = []
    monkeypatch.setattr(checkpoint, "load", lambda engine, path, **_: steps.append(path.name))
    monkeypatch.setattr(ending, "save_adapter", lambda *_, **__: None)
    return steps


def published_step(job) -> int:
    result = SimpleNamespace(step=4, best=Best({"step": 2, "value": 1.0}))
    prepared, loaded = SimpleNamespace(tokenizer=None), SimpleNamespace(engine=None)
    return ending._publish_adapter(job, prepared, loaded, result)


def test_the_adapter_is_that_of_the_best_validation(job, restored):
    assert published_step(job) == 2
    assert restored == ["step_2"]


@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_without_the_best_checkpoint_the_adapter_is_of_the_last_step_and_that_is_told(job, restored, damage):
    file = job.folder / "checkpoints" / "step_2" / "rank_00000.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"short")
    assert published_step(job) == 4
    assert restored == []
    (line,) = job.said
    assert line.startswith("warning: the checkpoint of the best validation") and "last step, 4" in line


def resumed(job, monkeypatch, total_steps=10, **more):
    """What `resume` makes of a checkpoint of step 4."""
    saved = {
        **more,
        "data_fingerprint": "f",
        "step": 4,
        "best": {"step": 2, "value": 1.0},
        "bad_validations": 3,
        "dro": {},
        "group_plan": {"by": "position", "num": 1, "column": None, "seed": 0, "fingerprint": ""},
    }
    restored = SimpleNamespace(client_state=saved, same_world=True)
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: restored)
    prepared = SimpleNamespace(stores={"train": SimpleNamespace(fingerprint="f")})
    loaded = SimpleNamespace(engine=None, base=SimpleNamespace(fingerprint="b"), total_steps=total_steps)
    return resuming.resume(job, prepared, loaded)


@pytest.mark.parametrize("place", ["here", "here, on another disk", "another run"])
def test_the_best_validation_of_another_run_folder_does_not_count(job, tmp_path, monkeypatch, place):
    path = job.folder / "checkpoints"
    monkeypatch.setattr(checkpoint, "resolve_resume", lambda folder, resume: (path / "step_4", []))
    if place == "here, on another disk":
        path.rename(tmp_path / "disk")
        path.symlink_to(tmp_path / "disk", target_is_directory=True)
    elif place == "another run":
        job.folder = tmp_path / "other"
    found = resumed(job, monkeypatch)
    assert found.first_step == 4
    elsewhere = place == "another run"
    assert found.best == (Best() if elsewhere else Best({"step": 2, "value": 1.0}, 3))
    assert any("does not count here" in line for line in job.said) == elsewhere


def test_a_checkpoint_of_another_run_that_leaves_no_step_to_do_is_refused(job, tmp_path, monkeypatch):
    path = job.folder / "checkpoints" / "step_4"
    monkeypatch.setattr(checkpoint, "resolve_resume", lambda folder, resume: (path, []))
    assert resumed(job, monkeypatch, total_steps=4).first_step == 4, "its own end may still be published"
    job.folder = tmp_path / "other"
    with pytest.raises(UserError, match="4 steps are done there, and this run ends after 4"):
        resumed(job, monkeypatch, total_steps=4)


def test_averages_of_other_losses_begin_anew_and_that_is_told(job, tmp_path, monkeypatch):
    """The moving averages of focal losses say nothing about the plain losses of gdrt."""
    path = job.folder / "checkpoints" / "step_4"
    monkeypatch.setattr(checkpoint, "resolve_resume", lambda folder, resume: (path, []))
    job.folder = tmp_path / "other"
    weighed = resuming.losses_weighed(job.config)
    assert resumed(job, monkeypatch, weighed=weighed).dro_state == {}
    assert not any("begin anew" in line for line in job.said)
    assert resumed(job, monkeypatch, weighed={**weighed, "objective": "focal"}).dro_state is None
    (told,) = [line for line in job.said if "begin anew" in line]
    assert "the checkpoint's run had another objective" in told


def test_weights_of_another_run_that_have_changed_since_are_refused(job, tmp_path, monkeypatch):
    """dro.frozen_weights names a run that went on meanwhile: q would change in the middle of this one."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"group_weight": [0.25, 0.75]}\n')
    job.config = RunConfig.model_validate(
        {"run": {"dir": str(job.folder)}, "dro": {"frozen_weights": str(other)}}
    )
    path = job.folder / "checkpoints" / "step_4"
    monkeypatch.setattr(checkpoint, "resolve_resume", lambda folder, resume: (path, []))
    named = resumed(job, monkeypatch).named
    assert list(named) == ["dro.frozen_weights"]
    assert resumed(job, monkeypatch, named=named).named == named
    (other / "metrics.jsonl").write_text('{"group_weight": [0.5, 0.5]}\n')
    with pytest.raises(UserError, match=f"dro.frozen_weights = {other} holds something else"):
        resumed(job, monkeypatch, named=named)
    job.folder = tmp_path / "third"
    assert resumed(job, monkeypatch, named=named).first_step == 4, "a new run may take other weights"
