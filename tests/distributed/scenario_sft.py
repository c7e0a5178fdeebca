"""Ranks behind test_sft_ranks.py: rows of prompt and completion under ZeRO-3 and NF4.

Three objectives train on two ranks. One training is stopped in the middle by the signal that asks for a
checkpoint. Another computes the same samples padded, one row each, on one rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gdrt_ds.config import load_config
from tests.data.sft_files import write_splits
from tests.distributed.ranks import run_ranks
from tests.distributed.stopped_runs import figures, train_here

STEPS = 6
STOP_AFTER = 3


def train(rank, world, data, folder, stop, *overrides):
    """Trains in this process; with `stop`, the signal for a checkpoint comes at step STOP_AFTER."""
    config = load_config(
        None,
        [
            f"data.path={data}",
            f"run.dir={folder}",
            "model.path=tiny-random",
            "model.dtype=float32",
            "model.lora={r: 4, alpha: 8, dropout: 0.1, targets: all-linear}",
            "groups.num=3",
            "train.global_batch=16",
            "train.micro_batch=4",
            "train.lr=5e-3",
            f"train.max_steps={STEPS}",
            "train.eval_every=100",
            "train.warmup_steps=0",
            "train.log_every=1",
            "deepspeed=ds_configs/zero3_qlora.json",
            *overrides,
        ],
    )
    return train_here(config, rank, world, STOP_AFTER if stop else None)


def main(output, folder):
    folder = Path(folder)
    data = write_splits(folder / "data")
    labels = ("groups.by=label", "objective=group_dro")
    plain = "model.lora={r: 4, alpha: 8, dropout: 0.0, targets: all-linear}"
    report = {"folder": str(folder)}
    report["status"] = [
        run_ranks(2, train, data, folder / "straight", False),
        run_ranks(2, train, data, folder / "stopped", True),
        run_ranks(2, train, data, folder / "stopped", False, "resume=auto"),
        run_ranks(2, train, data, folder / "tree", False, *labels, plain, "train.packing=prefix_tree"),
        run_ranks(1, train, data, folder / "padded", False, *labels, plain, "train.packing=none"),
        run_ranks(2, train, data, folder / "cvar", False, "groups.by=label", "objective=cvar"),
    ]
    for name in ("straight", "stopped", "tree", "padded", "cvar"):
        report[name] = figures(folder / name)
    Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
