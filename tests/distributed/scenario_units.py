"""Ranks behind test_zero3_units.py: the same steps with hooks on every module and on adapted layers alone.

One launch trains a tiny model several times, one engine after the other. It also checks the head of a model
whose backbone reads a weight past the module that has the hooks.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gdrt_ds.models import head_check
from gdrt_ds.training import zero3_units
from gdrt_ds.training.loading import free_engine
from gdrt_ds.training.model_with_loss import FusedLossModel
from tests.distributed import engines
from tests.distributed.ranks import run_ranks
from tests.models.family_models import make_family

STEPS = 5
LAYERS = 3
LORA = {"dropout": 0.0, "r": 4, "targets": "all-linear"}
CASES = {
    "a 4-bit base": {},
    "recomputed": {"gradient_checkpointing": True},
    "an unquantised base": {"quantization": "none"},
    "GPT-2": {"quantization": "none"},
}
"""Settings of the model."""


@contextlib.contextmanager
def hooks_everywhere(model, stage):
    """In place of `adapted_layers_as_units`: DeepSpeed as it is."""
    yield 0


@contextlib.contextmanager
def units_of_deepspeed(model, stage):
    """The same layers as units, with gradients that are reduced as DeepSpeed does it for units."""
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

    for layer in zero3_units.adapted_layers(model):
        set_z3_leaf_module(layer, True)
    yield 0


def train(rank, world, path, settings, units):
    """Returns the number of hooks, losses, gradient norms and the sums of all trainable weights."""
    engines.adapted_layers_as_units = units
    loaded = engines.load(path, rank, world, 3, **{"lora": LORA, **settings})
    engine = engines.start(loaded, 3, world)
    losses, norms = [], []
    for step in range(STEPS):
        losses += engines.train_steps(engine, rank, world, step, step + 1)
        norms.append(float(engine.get_global_grad_norm()))
    weights = {
        name: [value.double().sum().item(), value.double().square().sum().item()]
        for name, value in engines.trainable_state(engine).items()
        if "|" not in name
    }
    hooks = len(engine.optimizer.parameter_offload.forward_hooks)
    free_engine(engine)
    return {"hooks": hooks, "losses": losses, "norms": norms, "weights": weights}


def train_all(rank, world, paths):
    found = {}
    for name, settings in CASES.items():
        path = paths["gpt2" if name == "GPT-2" else "llama"]
        found[name] = {
            "everywhere": train(rank, world, path, settings, hooks_everywhere),
            "units": train(rank, world, path, settings, zero3_units.adapted_layers_as_units),
        }
    found["head of Gemma 4"] = head_line(rank, world, paths["gemma4"])
    try:
        train(rank, world, paths["llama"], {}, units_of_deepspeed)
        found["error of DeepSpeed"] = ""
    except RuntimeError as error:
        found["error of DeepSpeed"] = str(error)
    return found


def head_line(rank, world, path):
    """What the check of the head says of Gemma 4, whose backbone reads a row of the embedding itself."""
    head_check.COMPARED = frozenset()
    loaded = engines.load(path, rank, world, 3, lora=LORA)
    engines.adapted_layers_as_units = hooks_everywhere
    # As in a training, where the model is a part of what the engine drives.
    engine = engines.start(replace(loaded, model=FusedLossModel(loaded.model)), 3, world)
    inputs, places = head_check.probe_inputs(loaded.model, torch.device("cpu"))
    line = head_check.confirm_head(loaded.model, inputs, places, torch.float32)
    embedding = loaded.model.get_input_embeddings().weight
    freed = embedding.ds_status.name == "NOT_AVAILABLE"
    free_engine(engine)
    return [line, freed]


def main(output, folder):
    torch.manual_seed(0)
    llama = engines.tiny_folder(Path(folder), hidden=64, intermediate=128, num_layers=LAYERS)
    paths = {"llama": llama, **{name: make_family(name, Path(folder)) for name in ("gpt2", "gemma4")}}
    Path(output).write_text(json.dumps(run_ranks(2, train_all, paths)))


if __name__ == "__main__":
    main(*sys.argv[1:])
