"""Ranks behind test_held_bytes.py: which bytes of the packed base are alive between forward and backward.

The same training with the own 4-bit layer and with bitsandbytes', with and without recomputed
activations, with the base in host memory, and with nothing freed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from gdrt_ds.models import four_bit
from gdrt_ds.training.tensor_bytes import TensorBytes
from tests.distributed import engines
from tests.distributed.ranks import run_ranks

STEPS = 4
NOTHING_STAYS = {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 1,
}


def train(rank, world, path, own, checkpointing=False, **zero):
    """Returns sizes, and of every step: loss, gradient norm, packed bytes before and after the backward."""
    if not own:
        four_bit.use_four_bit_linear = lambda model: 0
    plain_config = engines.deepspeed_config

    def with_settings(stage, world, dtype="float32"):
        config = plain_config(stage, world, dtype)
        config["zero_optimization"].update(NOTHING_STAYS | zero)
        return config

    engines.deepspeed_config = with_settings
    loaded = engines.load(path, rank, world, 3, gradient_checkpointing=checkpointing)
    engine = engines.start(loaded, 3, world)
    packed = [p for p in engine.module.parameters() if getattr(p, "quant_state", None) is not None]
    slices = [p.ds_tensor for p in engine.module.parameters()]
    steps = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        ids = torch.randint(3, 200, (1, 12), generator=generator)
        with TensorBytes(besides=slices) as tensors:
            loss = engine(input_ids=ids, labels=ids).loss
            before = tensors.alive(torch.uint8)
            engine.backward(loss)
            after = tensors.alive(torch.uint8)
            engine.step()
        steps.append((loss.item(), float(engine.get_global_grad_norm()), before, after))
    return {
        "loading": loaded.loading,
        "whole": sum(p.ds_numel for p in packed),
        "shard": sum(p.ds_tensor.numel() for p in packed),
        "steps": steps,
    }


def main(output, folder):
    path = engines.tiny_folder(Path(folder), hidden=64, intermediate=128, num_layers=6)
    offload = {"offload_param": {"device": "cpu"}}
    cases = {
        "own": (2, True, False, {}),
        "own, recomputed": (2, True, True, {}),
        "own, base in host memory": (2, True, False, offload),
        "stock": (2, False, False, {}),
        "stock, recomputed": (2, False, True, {}),
        "own, everything reused": (2, True, False, {"stage3_max_reuse_distance": 10**9}),
    }
    report = {}
    for name, (world, own, checkpointing, zero) in cases.items():
        report[name] = run_ranks(world, _train_case, path, own, checkpointing, zero)
    Path(output).write_text(json.dumps(report))


def _train_case(rank, world, path, own, checkpointing, zero):
    return train(rank, world, path, own, checkpointing, **zero)


if __name__ == "__main__":
    main(*sys.argv[1:])
