"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gdrt_ds.config import RunConfig, TrainSection


def make_optimizer(
    parameters: list[nn.Parameter],
    train: TrainSection,
    deepspeed_config: dict[str, Any],
    device: torch.device,
) -> torch.optim.Optimizer:
    """The optimizer that the run config asks for, where the DeepSpeed config names none."""
    zero = deepspeed_config.get("zero_optimization") or {}
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=train.lr, weight_decay=train.weight_decay)
    if offload != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(
            parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, adamw_mode=True
        )
    return torch.optim.AdamW(
        parameters,
        lr=train.lr,
        betas=train.betas,
        weight_decay=train.weight_decay,
        fused=device.type == "cuda",
    )


def learning_rate(step: int, run: RunConfig, total_steps: int) -> float:
    """lr of optimizer step `step` (0-based): linear warm-up, then constant, linear or cosine to zero.

    It is a function of the step alone, so a resumed run has exactly the rates of a straight one.
    """
    train = run.train
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps)
    if train.schedule == "linear":
        return train.lr * max(0.0, 1.0 - done)
    if train.schedule == "cosine":
        return train.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return train.lr
