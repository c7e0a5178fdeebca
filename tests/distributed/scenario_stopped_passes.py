"""Ranks behind test_stopped_passes.py: one run that signals stop in every pass that trains nothing.

The signal comes to one of two ranks: in a validation, in the same validation again when the run goes on, in
a refresh of the groups and in the last validation.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path

from safetensors.torch import load_file

from gdrt_ds.config import load_config
from gdrt_ds.training import loop
from tests.distributed.launch import SMOKE
from tests.distributed.ranks import run_ranks
from tests.distributed.stopped_runs import figures, train_here

STEPS, EVAL_EVERY, REFRESH_EVERY = 6, 2, 5
STOPS = [("validate", 4), ("validate", 4), ("group_tokens", 5), ("validate", 6)]


def train(rank, world, folder, stop, *overrides):
    """Trains in this process.

    Args:
        stop: (the pass, the step that it follows) in which the signal comes to the last rank; None: never.
    """
    config = load_config(
        SMOKE,
        [
            f"run.dir={folder}",
            f"train.max_steps={STEPS}",
            f"train.eval_every={EVAL_EVERY}",
            "train.global_batch=8",
            "train.save_every=100",
            "train.log_every=1",
            "groups.reference=live",
            f"groups.refresh_every={REFRESH_EVERY}",
            "data.planted={num_train: 160, num_valid: 40, num_test: 20}",
            *overrides,
        ],
    )
    if stop is not None and rank == world - 1:
        signalled_in(*stop)
    return train_here(config, rank, world, catch=True)


def signalled_in(name: str, step: int) -> None:
    """From now on the pass sends this process a signal where it follows the step."""
    original = getattr(loop, name)

    @functools.wraps(original)
    def signalled(*args, **kwargs):
        if name == "group_tokens" or args[4] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    setattr(loop, name, signalled)


def left_behind(folder: Path) -> dict:
    lines = (folder / "validation.jsonl").read_text().splitlines()
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {
        "steps": figures(folder),
        "validations": [json.loads(line) for line in lines],
        "adapter": {name: weight.flatten().tolist() for name, weight in adapter.items()},
        "best": json.loads((folder / "summary.json").read_text())["best"],
    }


def main(output, folder):
    folder = Path(folder)
    report = {"straight_status": run_ranks(2, train, folder / "straight", None), "status": [], "saved": []}
    for stop in [*STOPS, None]:
        resume = ["resume=auto"] if report["status"] else []
        report["status"].append(run_ranks(2, train, folder / "stopped", stop, *resume))
        report["saved"].append(json.loads((folder / "stopped" / "summary.json").read_text())["step"])
    report |= {name: left_behind(folder / name) for name in ("straight", "stopped")}
    Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
