"""The best validation: which checkpoint the adapter comes from at the end, and what a run takes over from
another one.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gdrt_ds.config import RunConfig
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
    return SimpleNamespace(folder=run, config=config, say=said.append, said=said, runtime=None)


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


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_best_validation_of_another_run_folder_does_not_count(job, tmp_path, monkeypatch, elsewhere):
    saved = {
        "data_fingerprint": "f",
        "step": 4,
        "best": {"step": 2, "value": 1.0},
        "bad_validations": 3,
        "dro": {},
        "group_plan": {"by": "position", "num": 1, "column": None, "seed": 0, "fingerprint": ""},
    }
    path = job.folder / "checkpoints" / "step_4"
    monkeypatch.setattr(checkpoint, "resolve_resume", lambda folder, resume: (path, []))
    restored = SimpleNamespace(client_state=saved, same_world=True)
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: restored)
    if elsewhere:
        job.folder = tmp_path / "other"
    prepared = SimpleNamespace(stores={"train": SimpleNamespace(fingerprint="f")})
    loaded = SimpleNamespace(engine=None, base=SimpleNamespace(fingerprint="b"))
    found = resuming.resume(job, prepared, loaded)
    assert found.first_step == 4
    assert found.best == (Best() if elsewhere else Best({"step": 2, "value": 1.0}, 3))
    assert any("does not count here" in line for line in job.said) == elsewhere
