"""Trained once per data set: $GDRT_CACHE/sasrec/FINGERPRINT/ holds model.safetensors and about.json.

The fingerprint covers the train and valid windows, the grid, the seed and the recipe. The test split is not
part of it, because nothing here depends on it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eval.sasrec.model import SASRec
from eval.sasrec.sequences import Sequences
from eval.sasrec.training import CPU, Setting
from eval.sasrec.tuning import GRID, Tuned, tune
from gdrt_ds.files import cache_folder, process_lock, replacing, set_usual_mode, write_json

RECIPE = 1
"""Raise it with every change of model, training or tuning that changes what comes out."""

WEIGHTS = "model.safetensors"
ABOUT = "about.json"


@dataclass(frozen=True)
class Trained:
    """A model that is ready to score, and the content of its about.json."""

    model: SASRec
    about: dict[str, Any]


def fingerprint_of(sequences: Sequences, grid: tuple[Setting, ...] = GRID, seed: int = 0) -> str:
    """SHA-256 of everything that the trained model depends on."""
    recipe = json.dumps([RECIPE, [asdict(setting) for setting in grid], seed, sequences.digest()])
    return hashlib.sha256(recipe.encode()).hexdigest()


def folder_of(fingerprint: str) -> Path:
    return cache_folder() / "sasrec" / fingerprint[:32]


def cached(sequences: Sequences, fingerprint: str) -> Trained | None:
    """The model of an earlier training; None where there is none, or where it cannot be read."""
    folder = folder_of(fingerprint)
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        setting = Setting(**about["setting"])
        model = SASRec(sequences.num_items, sequences.max_history, setting.hidden, setting.dropout)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        print(f"sasrec: {folder} cannot be read ({type(error).__name__}); it is trained again", flush=True)
        return None
    return Trained(model.eval(), about)


def load_or_train(
    sequences: Sequences,
    grid: tuple[Setting, ...] = GRID,
    seed: int = 0,
    device: torch.device = CPU,
    say: Callable[[str], None] = print,
) -> Trained:
    """The cached model, or a new one that is cached. Two processes never train the same one side by side."""
    fingerprint = fingerprint_of(sequences, grid, seed)
    folder = folder_of(fingerprint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with process_lock(folder.with_suffix(".lock")):
        found = cached(sequences, fingerprint)
        if found is None:
            started = time.perf_counter()
            tuned = tune(sequences, grid, seed, device, say)
            found = trained_now(sequences, tuned, fingerprint, time.perf_counter() - started)
            _keep(folder, found)
    return found


def trained_now(sequences: Sequences, tuned: Tuned, fingerprint: str, seconds: float) -> Trained:
    """What a tuning gave, ready to score.

    Args:
        seconds: that the tuning took.
    """
    setting = tuned.setting
    model = SASRec(sequences.num_items, sequences.max_history, setting.hidden, setting.dropout)
    model.load_state_dict(tuned.weights)
    tried = [
        {"setting": asdict(one), "epochs": [asdict(epoch) for epoch in epochs]}
        for one, epochs in tuned.tried.items()
    ]
    about = {
        "fingerprint": fingerprint,
        "recipe": RECIPE,
        "setting": asdict(setting),
        "best_epoch": tuned.best + 1,
        "valid": asdict(tuned.valid),
        "tried": tried,
        "seconds": seconds,
        "torch": torch.__version__,
    }
    return Trained(model.eval(), about)


def _keep(folder: Path, trained: Trained) -> None:
    folder.mkdir(exist_ok=True)
    with replacing(folder / WEIGHTS) as scratch:
        save_file(trained.model.state_dict(), scratch)
        set_usual_mode(scratch)
    write_json(folder / ABOUT, trained.about)  # last: without it the folder counts as empty
