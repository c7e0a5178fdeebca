"""A small real QLoRA engine for scenarios: tiny Llama, NF4, LoRA, DeepSpeed.

And a deterministic training step.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from gdrt_ds.config import ModelSection
from gdrt_ds.models.built_in import make_tiny_model
from gdrt_ds.models.load import LoadedModel, load_model
from gdrt_ds.training.zero3_units import adapted_layers_as_units

TEXTS = [
    "The Matrix (1999)",
    "Toy Story (1995)",
    "Heat (1995)",
    "Alien (1979)",
    "Fargo (1996)",
    "Brazil (1985)",
]


def tiny_folder(folder: Path, **sizes) -> Path:
    return make_tiny_model(
        Path(folder) / ("tiny_" + "_".join(f"{k}{v}" for k, v in sizes.items())), TEXTS, 0, **sizes
    )


def deepspeed_config(stage: int, world: int, dtype: str = "float32") -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 200},
    }


def section(path, **changes) -> ModelSection:
    return ModelSection(
        **{
            "path": str(path),
            "dtype": "float32",
            "lora": {"dropout": 0.1, "r": 4, "targets": ["q_proj", "v_proj", "down_proj"]},
            **changes,
        }
    )


def load(path, rank: int, world: int, stage: int, seed: int = 0, **changes) -> LoadedModel:
    runtime = SimpleNamespace(device="cpu", rank=rank, world=world)
    dtype = changes.get("dtype", "float32")
    return load_model(
        section(path, **changes),
        runtime,
        train=True,
        seed=seed,
        deepspeed_config=deepspeed_config(stage, world, dtype),
    )


def start(loaded: LoadedModel, stage: int, world: int, dtype: str = "float32"):
    """(engine, model parameters are sharded by now)"""
    import deepspeed

    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))
    with adapted_layers_as_units(loaded.model, stage):
        engine, *_ = deepspeed.initialize(
            model=loaded.model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(stage, world, dtype),
        )
    return engine


def train_steps(engine, rank: int, world: int, first: int, last: int) -> list[float]:
    """Losses of steps first .. last-1; the data of a step depend on (step, sample) only.

    One sample per rank.
    """
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        ids = torch.randint(3, 200, (1, 12), generator=generator)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def trainable_state(engine) -> dict[str, torch.Tensor]:
    """Full float32 weights and moments of every trainable parameter, gathered by DeepSpeed itself."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            state[name] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{name}|{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
    return state
