"""Plain token losses without gradients: of one micro-batch, or of a whole split over all ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from gdrt_ds.batches import BatchPlan, MicroBatch, build_micro_batch
from gdrt_ds.loss import AllowedTokens
from gdrt_ds.training.job import Job
from gdrt_ds.training.loading import Loaded
from gdrt_ds.training.preparation import Prepared


def token_losses(
    engine,
    micro: MicroBatch,
    device: torch.device,
    allowed: AllowedTokens | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Returns float[N], the loss of every target token of a micro-batch under the active adapter.

    Args:
        allowed: the tokens that each may be; None is the whole vocabulary.
        temperature: logits are divided by it.
    """
    with torch.no_grad():
        one_group = torch.zeros(len(micro.token_index), dtype=torch.long, device=device)
        return engine(micro, one_group, 1, temperature, allowed)[1]


def split_losses(
    job: Job,
    prepared: Prepared,
    loaded: Loaded,
    split: str,
    *,
    beat: Callable[[], None],
    samples: np.ndarray | None = None,
    announce: str | None = None,
    allowed_of: Callable[[MicroBatch], AllowedTokens] | None = None,
    temperature: float = 1.0,
) -> np.ndarray:
    """float64[target tokens of the split], the same on every rank; the caller puts the engine into
    evaluation mode.

    Args:
        beat: called after every micro-batch, so that the watchdog sees progress.
        samples: score these only; the tokens of all others are 0.
        announce: what to call the work in a line before it and four lines during it; None says nothing.
        allowed_of: the tokens that each target token may be; None is the whole vocabulary.
        temperature: logits are divided by it.
    """
    store, runtime = prepared.stores[split], job.runtime
    chosen = np.arange(len(store)) if samples is None else samples
    plan = BatchPlan(
        store.lengths,
        job.config.train.global_batch,
        loaded.plan.micro_batch * 2,  # without gradients twice the samples fit
        runtime.world,
        0,
        loaded.packing != "none",
    )
    rounds = plan.split(chosen)
    losses = torch.zeros(int(store.target_offsets[-1]), dtype=torch.float64)
    if announce:
        job.say(f"{announce}: {len(rounds)} micro-batches to go")
    for index, slots in enumerate(rounds):
        micro = build_micro_batch(
            store,
            slots[runtime.rank],
            loaded.packing,
            prepared.data.prefix_length,
            prepared.tokenizer.pad_token_id,
            runtime.device,
        )
        allowed = None if allowed_of is None else allowed_of(micro)
        found = token_losses(loaded.engine, micro, runtime.device, allowed, temperature)
        losses[micro.token_index] = found.double().cpu()
        beat()
        if announce and (index + 1) % max(1, len(rounds) // 4) == 0:
            job.say(f"{announce}: {index + 1}/{len(rounds)} micro-batches")
    if runtime.world > 1:
        losses = losses.to(runtime.device)
        dist.all_reduce(losses)
    return losses.cpu().numpy()
