"""A run that stops early: the adapter is that of the best validation, also where a resume publishes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.launch import SMOKE, play
from tests.distributed.ranks import preload

pytestmark = pytest.mark.slow
SETTINGS = [
    "--config",
    SMOKE,
    "data.planted={num_train: 32, num_valid: 20, num_test: 20, num_items: 8}",
    "model.quantization=none",
    "groups.by=position",
    "groups.num=2",
    "objective=sft",
    "train.schedule=constant",
    "train.warmup_steps=0",
    "train.lr=0.02",  # so large that 32 samples are soon known by heart, and the validation loss rises
    "train.global_batch=16",
    "train.micro_batch=16",
    "train.max_steps=null",
    "train.epochs=30",
    "train.patience=3",
    "train.eval_every=null",  # at the end of each epoch, which has two steps
    "train.save_every=null",
]


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def validations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The folder of a run that train.patience ended."""
    folder = tmp_path_factory.mktemp("early_stop")
    preload()
    done = play(1, [*SETTINGS, f"run.dir={folder / 'run'}"], folder / "logs")
    assert done.statuses == [0], done.text[-3000:]
    return folder / "run"


def test_the_best_checkpoint_is_kept_where_each_epoch_ends_with_a_validation(stopped):
    summary = summary_of(stopped)
    best = min(validations(stopped), key=lambda line: line["nll"])["step"]
    assert summary["stopped_early"]
    assert summary["step"] == best + 3 * 2
    assert summary["best"]["step"] == summary["adapter_step"] == best
    kept = {path.name for path in (stopped / "checkpoints").glob("step_*")}
    assert {f"step_{best}", f"step_{summary['step']}"} <= kept and len(kept) <= 3


def test_a_resume_after_the_early_stop_trains_no_further_and_publishes_the_same_adapter(stopped, tmp_path):
    killed = tmp_path / "run"
    shutil.copytree(stopped, killed)
    (killed / "summary.json").unlink()
    shutil.rmtree(killed / "adapter")
    done = play(1, [*SETTINGS, f"run.dir={killed}", "resume=auto"], tmp_path / "logs")
    assert done.statuses == [0], done.text[-3000:]
    before, after = summary_of(stopped), summary_of(killed)
    for key in ("status", "step", "adapter_step", "stopped_early", "best"):
        assert after[key] == before[key], key
    assert validations(killed) == validations(stopped)
    weights = "adapter/adapter_model.safetensors"
    assert (killed / weights).read_bytes() == (stopped / weights).read_bytes()
    assert f"early stop at step {before['step']}" in done.text
