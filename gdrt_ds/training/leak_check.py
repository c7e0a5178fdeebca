"""Measures, once after loading, whether the samples of a packed row see each other.

The choice of packing reads the code of the layers (gdrt_ds/models/layer_types.py); this reads what they
compute, with the engine, the attention kernel and the quantization of the run. Three short samples A, B,
C stand in one row. B's losses are compared after all tokens of A were changed, and after those of C
were. Nothing may move them but the order of sums: routed experts work on as many rows as tokens come to
them. That is the control: a causal layer that leaks lets A reach B and never C, so A may move B no more
than C does.

It costs three forward passes of about twenty tokens. Every rank takes part, so it works under ZeRO-3.

Shapes: N target tokens of B.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from gdrt_ds.batches import MicroBatch, build_micro_batch
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.errors import UserError
from gdrt_ds.models.head_check import confirm_head

SHARED = 2
"""Tokens that the samples have in common, as all prompts begin alike."""
LENGTHS = (8, 6, 7)
"""Further tokens of A, B and C. A is the longest, because a prefix tree begins with the longest row."""
SEEDS = ((1, 2, 3), (4, 2, 3), (1, 2, 5))
"""Of the tokens of A, B and C: as usual, with another A, with another C."""
TOLERANCE = {torch.float32: 1e-4}
"""Nats by which B's losses may move in any case, by dtype."""
HALF_TOLERANCE = 1e-2
ABOVE_CONTROL = 10.0
"""How many times as much A may move B as C does."""
NO_MASK = 100.0
"""Times the tolerance: if C moves B by more, B sees what stands behind it."""


@dataclass(frozen=True)
class Leak:
    """By how many nats the losses of sample B move, at most.

    Attributes:
        before: when A, which stands before B, changes.
        after: when C, which stands behind B, changes.
    """

    before: float
    after: float

    def found(self, dtype: torch.dtype) -> bool:
        """Whether samples see each other. Losses that are not numbers say nothing."""
        tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
        return self.after > NO_MASK * tolerance or self.before > max(tolerance, ABOVE_CONTROL * self.after)


def measure_leak(engine, packing: str, vocabulary: int, pad_id: int, device: torch.device) -> Leak:
    """Runs the probe; the same result on every rank.

    Args:
        engine: DeepSpeed's, around the FusedLossModel.
        packing: packed, shared_prefix or prefix_tree.
        vocabulary: tokens of the model.
    """

    def losses_of_b(seeds: tuple[int, int, int]) -> torch.Tensor:
        store = probe(vocabulary, seeds)
        micro = build_micro_batch(store, np.arange(3), packing, SHARED, pad_id, device).to(device)
        first, second = store.target_offsets[1:3]
        return _losses(engine, micro)[first:second].double()

    usual, *others = [losses_of_b(seeds) for seeds in SEEDS]
    moved = torch.stack([(other - usual).abs().max() for other in others])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(moved, op=dist.ReduceOp.MAX)
    return Leak(*moved.tolist())


def pass_once(engine, vocabulary: int, pad_id: int, device: torch.device) -> None:
    """One forward without gradients, so that ZeRO-3 sees the model before the first step.

    Some layers use the parameter of another module (LFM2's short convolution, that of its Conv1d). ZeRO-3
    finds that out in the first forward, and then gathers in another order than it has just noted down for the
    second, which it refuses as a "tracing error". Where groups are kept, as in a resumed run, that forward
    would be the first step's.
    """
    micro = build_micro_batch(probe(vocabulary, SEEDS[0]), np.arange(1), "none", 0, pad_id, device).to(device)
    _losses(engine, micro)


def check_head(
    engine, packing: str, vocabulary: int, pad_id: int, dtype: torch.dtype, device: torch.device
) -> str:
    """`confirm_head` of the model under the engine, on a row of the run's own layout."""
    store = probe(vocabulary, SEEDS[0])
    micro = build_micro_batch(store, np.arange(1), packing, SHARED, pad_id, device).to(device)
    return confirm_head(engine.module.model, micro.inputs, micro.supervised, dtype)


def _losses(engine, micro: MicroBatch) -> torch.Tensor:
    """[N] losses without gradients and without dropout; the engine's mode (train or eval) is kept."""
    training = engine.training
    engine.eval()
    with torch.no_grad():
        losses = engine(micro, torch.zeros_like(micro.labels), 1)[1]
    engine.train(training)
    return losses


def probe(vocabulary: int, seeds: tuple[int, int, int]) -> TokenStore:
    """Three samples of random tokens behind a common start; every token of their own is a target."""
    start = np.random.default_rng(0).integers(0, vocabulary, SHARED)
    rows = []
    for place, (seed, length) in enumerate(zip(seeds, LENGTHS, strict=True)):
        own = np.random.default_rng(seed).integers(0, vocabulary, length)
        # A prefix tree lays rows out in the order of their tokens. So the first own token of A is of the
        # lowest third of the vocabulary, that of B of the next, that of C of the one above.
        third = vocabulary // len(LENGTHS)
        own[0] = place * third + own[0] % third
        rows.append(np.concatenate([start, own]))
    ids = np.concatenate(rows).astype(np.int32)
    targets = np.array(LENGTHS, np.int32) - 1  # the first own token is predicted from the common start
    return TokenStore(
        ids,
        np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        np.zeros(len(ids), np.int8),
        targets,
        np.concatenate([[0], np.cumsum(targets)]).astype(np.int64),
    )


def confirm_packing(
    wanted: str, packing: str, engine, model_config, pad_id: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """Returns the packing to use and the line to announce; the line is empty where rows are not packed.

    Args:
        wanted: `train.packing`.
        packing: what was chosen from the layers.
        model_config: transformers' config of the model.

    Raises:
        UserError: samples see each other in rows that were asked for.
    """
    if packing == "none":
        return packing, ""
    vocabulary = model_config.get_text_config().vocab_size
    leak = measure_leak(engine, packing, vocabulary, pad_id, device)
    text = f"another sample's tokens move a sample's losses by {max(leak.before, leak.after):.1e} nats"
    if not leak.found(dtype):
        return packing, f"packing: measured on a probe row, {text}"
    if wanted == "auto":
        return "none", f"packing: none (auto: measured on a probe row, {text})"
    raise UserError(
        f"train.packing = {wanted} would let the samples of a row see each other: measured on a probe "
        f"row, {text}",
        "set train.packing=auto or none",
    )
