"""Ranks behind test_hpz.py: four ranks as two nodes of two, each pair with a copy of the slices."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from gdrt_ds.training import checkpoint, lives
from tests.distributed import engines
from tests.distributed.ranks import run_ranks

WORLD = 4


def train(rank, world, model, loading, hpz, run=None, resume=False):
    """Losses of four steps, and how the packed weights are held.

    Args:
        run: a checkpoint is saved there after two steps.
        resume: goes on from that checkpoint instead of starting.
    """
    plain_config = engines.deepspeed_config

    def with_settings(stage, world, dtype="float32"):
        config = plain_config(stage, world, dtype)
        config["zero_optimization"]["stage3_max_reuse_distance"] = 0
        if hpz:
            config["zero_optimization"]["zero_hpz_partition_size"] = 2
        return config

    engines.deepspeed_config = with_settings
    torch.manual_seed(rank)
    loaded = engines.load(model, rank, world, 3, loading=loading)
    engine = engines.start(loaded, 3, world)
    first = 0
    losses = []
    if resume:
        path, _ = checkpoint.resolve_resume(run, "auto")
        first = checkpoint.load(engine, path, fingerprint=loaded.fingerprint).step
    elif run is not None:
        losses = engines.train_steps(engine, rank, world, 0, 2)
        first = 2
        life = lives.begin_life(run) if rank == 0 else 1
        checkpoint.save(engine, run, 2, client_state={}, life=life, fingerprint=loaded.fingerprint)
    losses += engines.train_steps(engine, rank, world, first, 4)
    packed = [p for p in engine.module.parameters() if getattr(p, "quant_state", None) is not None]
    seconds = [p.ds_secondary_tensor for p in packed]
    return {
        "losses": losses,
        "loading": loaded.loading,
        "whole": sum(p.ds_numel for p in packed),
        "primary": sum(p.ds_tensor.numel() for p in packed),
        "secondary": sum(tensor.numel() for tensor in seconds if tensor is not None),
    }


def main(output, folder):
    folder = Path(folder)
    model = engines.tiny_folder(folder)
    run = folder / "run"
    report = {
        "one copy": run_ranks(WORLD, train, model, "sharded", False),
        "two copies": run_ranks(WORLD, train, model, "sharded", True, run),
        "two copies, resumed": run_ranks(WORLD, train, model, "sharded", True, run, True),
        "two copies, stock loading": run_ranks(WORLD, train, model, "stock", True),
    }
    Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
