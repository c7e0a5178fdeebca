"""Ranks behind test_growing_ranks.py: growing windows as a prefix tree, straight, stopped and resumed.

Trainings on two ranks and on one are stopped in the middle of an epoch by the signal that asks for a
checkpoint. Another computes the same samples padded, one row each. A model whose convolutions leak is let
into trees, so that the measurement after loading has to put it back to padded rows; its run is stopped and
resumed, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gdrt_ds.config import DataSection, load_config
from gdrt_ds.data.corpus import load_corpus
from tests.data.test_growing import table
from tests.distributed.ranks import run_ranks
from tests.distributed.stopped_runs import figures, train_here
from tests.models.family_models import make_family

STEPS = 14
LEAKY_STEPS = 9
STOP_AFTER = 5
GLOBAL_BATCH = 24


def train(rank, world, data, folder, stop, *overrides):
    """Trains in this process; with `stop`, the signal for a checkpoint comes at step STOP_AFTER."""
    config = load_config(
        None,
        [
            f"data.path={data}",
            f"run.dir={folder}",
            "model.path=tiny-random",
            "model.dtype=float32",
            "prompt.template=plain",
            "data.windows=growing",
            "objective=gdrt",
            "groups.num=3",
            "dro.excess=markov",
            "model.lora={r: 4, alpha: 8, dropout: 0.0, targets: all-linear}",
            f"train.global_batch={GLOBAL_BATCH}",
            "train.micro_batch=6",
            f"train.max_steps={STEPS}",
            "train.eval_every=100",
            "train.warmup_steps=0",
            "train.log_every=1",
            "deepspeed=ds_configs/cpu.json",
            *overrides,
        ],
    )
    return train_here(config, rank, world, STOP_AFTER if stop else None)


def train_leaky(rank, world, data, folder, stop, *overrides):
    """The same where the choice from the layers misses a leak: it lets every model into a prefix tree."""
    from gdrt_ds.training import preparation

    preparation.choose_packing = lambda config, model_config: (
        "prefix_tree",
        "packing: prefix_tree (planted)",
    )
    return train(rank, world, data, folder, stop, *overrides)


def main(output, folder):
    folder = Path(folder)
    data = table(folder / "log", num_users=30, seed=5)
    report = {}
    report["status"] = [
        run_ranks(2, train, data, folder / "straight", False),
        run_ranks(2, train, data, folder / "stopped", True),
        run_ranks(2, train, data, folder / "stopped", False, "resume=auto"),
        run_ranks(1, train, data, folder / "padded", False, "train.packing=none"),
        run_ranks(1, train, data, folder / "straight_alone", False),
        run_ranks(1, train, data, folder / "stopped_alone", True),
        run_ranks(1, train, data, folder / "stopped_alone", False, "resume=auto"),
    ]
    # The convolutions of LFM2 carry tokens into the next sample of a row. The model has 1024 positions.
    leaky = [f"model.path={make_family('lfm2', folder)}", "model.quantization=none", "prompt.max_length=900"]
    leaky.append(f"train.max_steps={LEAKY_STEPS}")
    report["leaky_status"] = [
        # Resumed without any forward before its first step, which is why pass_once exists (leak_check.py).
        run_ranks(2, train, data, folder / "leaky_padded", True, *leaky, "train.packing=none"),
        run_ranks(
            2, train, data, folder / "leaky_padded", False, *leaky, "train.packing=none", "resume=auto"
        ),
        run_ranks(2, train_leaky, data, folder / "leaky", True, *leaky),
        run_ranks(2, train_leaky, data, folder / "leaky", False, *leaky, "resume=auto"),
    ]
    for name in ("straight", "stopped", "padded", "straight_alone", "stopped_alone", "leaky_padded", "leaky"):
        report[name] = figures(folder / name)
    report["leaky_packing"] = json.loads((folder / "leaky" / "summary.json").read_text())["packing"]
    report["train_samples"] = len(load_corpus(DataSection(path=str(data))).split("train"))
    Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
