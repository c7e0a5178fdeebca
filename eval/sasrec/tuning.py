"""Which setting is taken: a small grid by successive halving, judged on the valid split alone.

Every setting trains for a few epochs, the better half goes on, and the last one trains until early stopping
(Jamieson & Talwalkar, AISTATS 2016). A full grid to the end would cost three times as much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.sasrec.sequences import Sequences
from eval.sasrec.training import CPU, Epoch, Setting, Training

GRID = tuple(
    Setting(hidden, dropout, learning_rate)
    for hidden in (64, 128)
    for dropout in (0.2, 0.5)
    for learning_rate in (1e-3, 3e-3)
)

ROUNDS = (2, 5, 9)
"""Finished epochs at which the better half of the settings goes on."""

USUAL_EPOCHS = 18
"""Of the setting that is taken; for estimates of the time."""

SECONDS_BETWEEN_LINES = 15


@dataclass(frozen=True)
class Tuned:
    """The setting that is taken, with its best epoch, and what all of them gave.

    Attributes:
        setting: that is taken. weights: of its best epoch.
        best: place in its `epochs` of the best one.
        tried: setting -> its epochs, all settings.
    """

    setting: Setting
    weights: dict[str, Tensor]
    best: int
    tried: dict[Setting, list[Epoch]]

    @property
    def valid(self) -> Epoch:
        """The figures of the best epoch."""
        return self.tried[self.setting][self.best]


def tune(
    sequences: Sequences,
    grid: tuple[Setting, ...] = GRID,
    seed: int = 0,
    device: torch.device = CPU,
    say: Callable[[str], None] = print,
) -> Tuned:
    """Trains the grid; the lowest validation NLL wins, the first of equal ones.

    Args:
        say: gets a line of progress every 15 s.
    """
    trainings = [Training(sequences, setting, seed, device) for setting in grid]
    alive = list(trainings)
    spoken = time.perf_counter()
    for goal in (*ROUNDS, None):
        for training in alive:
            while not training.ended and (goal is None or len(training.epochs) < goal):
                epoch = training.run_epoch()
                if time.perf_counter() - spoken > SECONDS_BETWEEN_LINES:
                    spoken = time.perf_counter()
                    say(
                        f"sasrec: {len(alive)} of {len(grid)} settings left; {training.setting.words()}, "
                        f"epoch {len(training.epochs)}: validation NLL {epoch.nll:.3f}, NDCG@10 "
                        f"{epoch.ndcg:.4f}, best NLL {training.best_nll:.3f}"
                    )
        ranked = sorted(alive, key=lambda training: training.best_nll)  # stable: ties keep the grid's order
        if goal is not None:
            alive = ranked[: max(1, len(alive) // 2)]
    best = sorted(trainings, key=lambda training: training.best_nll)[0]
    return Tuned(
        best.setting,
        best.best_weights,
        best.best,
        {training.setting: training.epochs for training in trainings},
    )


def expected_epochs(num_settings: int) -> int:
    """Epochs of all settings together, if the last one takes `USUAL_EPOCHS`."""
    total, before, alive = 0, 0, num_settings
    for goal in ROUNDS:
        total += alive * (goal - before)
        before, alive = goal, max(1, alive // 2)
    return total + alive * (USUAL_EPOCHS - before)


def expected_seconds(
    sequences: Sequences, grid: tuple[Setting, ...] = GRID, device: torch.device = CPU
) -> float:
    """About how long `tune` takes on this machine as it is now, from a few steps of each hidden size."""
    per_epoch = {}
    for setting in grid:
        if setting.hidden not in per_epoch:
            per_epoch[setting.hidden] = Training(sequences, setting, 0, device).seconds_per_epoch()
    mean = sum(per_epoch[setting.hidden] for setting in grid) / len(grid)
    return mean * expected_epochs(len(grid))
