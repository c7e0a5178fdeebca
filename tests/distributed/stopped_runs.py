"""A training in this rank that a signal can stop at a step, and the figures that two runs are compared by."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from gdrt_ds.config import RunConfig
from gdrt_ds.runtime import Runtime, catch_stop_signals
from gdrt_ds.training.run import run_training


def train_here(
    config: RunConfig, rank: int, world: int, stop_at: int | None = None, *, catch: bool = False
) -> int:
    """Trains as one rank of `world`; returns the exit status.

    Args:
        stop_at: the step at which the signal for a checkpoint comes; None: never.
        catch: signals that the process gets ask for it, too.
    """
    runtime = Runtime(rank=rank, local_rank=rank, world=world, local_world=world)
    if catch:
        catch_stop_signals(runtime)
    if stop_at is not None:
        from gdrt_ds.training.step import StepRunner

        plain = StepRunner.run

        def run(self, step, lr):
            if step == stop_at:
                runtime.stop_signal = signal.SIGUSR1
            return plain(self, step, lr)

        StepRunner.run = run
    return run_training(config, runtime)


def figures(folder: Path) -> list[list]:
    """Of every step: its number, loss, group losses, group weights and gradient norm."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[r["step"], r["loss"], r["group_loss"], r["group_weight"], r["grad_norm"]] for r in records]
