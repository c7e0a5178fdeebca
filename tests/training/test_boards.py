"""TensorBoard and Weights & Biases after a requeue: the run goes on, as one run with one line."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from gdrt_ds.config import load_config
from gdrt_ds.runtime import Runtime
from gdrt_ds.training.telemetry import Telemetry, wandb_id


def live(folder, first_step: int, steps: list[int], losses: dict[int, float]) -> None:
    """One life of a run: it writes these steps to TensorBoard."""
    config = load_config(None, [f"run.dir={folder}", "log.tensorboard=true"])
    with Telemetry(folder, config, Runtime(), 8, first_step) as telemetry:
        for step in steps:
            telemetry.board.add_scalar("loss", losses[step], step)


def test_tensorboard_shows_every_step_once_after_a_life_that_was_cut_off(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    losses = {step: 1.0 / step for step in range(1, 9)}
    live(tmp_path, 0, [1, 2, 3, 4], losses)  # its last checkpoint is of step 2
    live(tmp_path, 2, [3, 4, 5], losses)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_a_run_keeps_its_id_at_weights_and_biases(tmp_path, monkeypatch):
    """A module stands in for wandb, which is no dependency: it writes down what it is asked for."""
    asked = []
    stand_in = ModuleType("wandb")
    stand_in.init = lambda **settings: asked.append(settings) or ModuleType("run")
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        folder.mkdir(exist_ok=True)
        config = load_config(None, [f"run.dir={folder}", "log.wandb=true"])
        Telemetry(folder, config, Runtime(), 8, 0)
    first, again, other = (settings["id"] for settings in asked)
    assert first == again == wandb_id(tmp_path / "a")
    assert other != first
    assert {settings["resume"] for settings in asked} == {"allow"}
