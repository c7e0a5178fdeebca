"""Ranks behind test_token_rows_ranks.py.

Trained rows of added tokens under ZeRO-3, where nothing stays gathered, and under ZeRO-1, where every rank
holds everything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from gdrt_ds.training.adapter import save_adapter
from gdrt_ds.training.model_with_loss import FusedLossModel
from gdrt_ds.training.zero3_units import adapted_layers_as_units
from tests.distributed import engines
from tests.distributed.ranks import run_ranks
from tests.models.test_token_rows import NEW, fused_loss, make_folder

STEPS = 3


def train(rank, world, path, stage, output):
    """Losses of this rank's own sequences, and the saved rows."""
    import deepspeed
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    lora = {"dropout": 0.0, "r": 4, "targets": ["q_proj", "down_proj"], "trainable_tokens": "added"}
    loaded = engines.load(path, rank, world, stage, lora=lora)
    module = FusedLossModel(loaded.model)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    setup = engines.deepspeed_config(stage, world)
    setup["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with adapted_layers_as_units(loaded.model, stage):
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW(trainable, lr=1e-2),
            config=setup,
            model_parameters=trainable,
        )
    added = AutoTokenizer.from_pretrained(path).convert_tokens_to_ids(NEW)
    ids = torch.tensor([[5 + rank, added[0], 9, added[2], 11 + rank, added[1], 4]])
    losses = []
    for _ in range(STEPS):
        loss = fused_loss(engine, ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    save_adapter(engine, output)
    rows = {
        k: v.tolist()
        for k, v in load_file(Path(output) / "adapter_model.safetensors").items()
        if "token" in k
    }
    return losses, rows


def main(output, folder):
    folder = Path(folder)
    report = {}
    for tied in (True, False):
        path = make_folder(folder, tied)
        report[f"tied_{tied}"] = {
            f"stage{stage}": run_ranks(2, train, path, stage, folder / f"adapter_{tied}_{stage}")
            for stage in (3, 1)
        }
    Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
