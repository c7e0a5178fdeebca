"""Lays the samples of a micro-batch out as tensors.

They become padded rows, or one packed row in which samples may share the prompt's start.

Shapes: B samples, T positions, N supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gdrt_ds.batches.tree_attention import TreeLayout, packed_inputs
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.errors import UserError
from gdrt_ds.runtime.devices import to_device


@dataclass
class MicroBatch:
    """What one rank computes in one forward.

    Attributes:
        inputs: keyword arguments of the backbone (input_ids [B, T], masks or layout, positions).
        supervised: Long[N], positions in the flattened [B*T] hidden states that predict a target token.
        labels: Long[N], the target tokens.
        token_index: Long[N], index of the target token in the split's flat target array
            (`TokenStore.target_offsets`).
        num_tokens: tokens computed that are not padding.
    """

    inputs: dict
    supervised: Tensor
    labels: Tensor
    token_index: np.ndarray
    samples: np.ndarray
    num_tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        def move(value):
            return to_device(value, device) if isinstance(value, Tensor) else value

        return MicroBatch(
            {k: move(v) for k, v in self.inputs.items()},
            move(self.supervised),
            move(self.labels),
            self.token_index,
            self.samples,
            self.num_tokens,
        )


def _rows(store: TokenStore, samples: np.ndarray) -> list[np.ndarray]:
    return [store.input_ids[store.offsets[s] : store.offsets[s + 1]] for s in samples]


def build_micro_batch(
    store: TokenStore,
    samples: np.ndarray,
    packing: str,
    prefix_length: int,
    pad_id: int,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Lays samples out in the chosen packing.

    The position before a token predicts it: inputs are a sample's tokens 0 .. T-2, labels its last num_target
    tokens. An empty slot becomes one dummy token with nothing supervised, so that every rank runs the same
    collectives.
    """
    rows = [row[:-1] for row in _rows(store, samples)]
    targets = [
        store.input_ids[store.offsets[s + 1] - store.num_target[s] : store.offsets[s + 1]] for s in samples
    ]
    nothing = np.zeros(0, dtype=np.int64)
    places = [np.arange(store.target_offsets[s], store.target_offsets[s + 1]) for s in samples]
    token_index = np.concatenate([nothing, *places])
    labels = np.concatenate([nothing, *targets]).astype(np.int64)
    if not rows:
        rows = [np.array([pad_id], dtype=np.int64)]
        targets = [nothing]
    shared = prefix_length if packing == "shared_prefix" and len(samples) else 0
    bodies = [len(row) - shared for row in rows]
    if any(len(target) > body for target, body in zip(targets, bodies)):
        raise UserError(
            f"the shared head of {shared} tokens holds a position that predicts a target token, and each "
            "sample needs its own",
            "give the prompt template some text after the history (after_history), or set "
            "train.packing=packed",
        )
    if packing == "none":
        width = max(len(row) for row in rows)
        ids = np.full((len(rows), width), pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for b, row in enumerate(rows):
            ids[b, : len(row)] = row
            mask[b, : len(row)] = 1
        stops = [b * width + len(row) for b, row in enumerate(rows)]
        inputs = {
            "input_ids": to_device(ids, device),
            "attention_mask": to_device(mask, device),
            "position_ids": torch.arange(width, device=device).expand(len(rows), -1),
        }
        num_tokens = int(mask.sum())
    else:
        layout = TreeLayout.build(bodies, shared, device)
        flat = np.concatenate([rows[0][:shared]] + [row[shared:] for row in rows]).astype(np.int64)
        stops = list(shared + np.cumsum(bodies))
        inputs = {"input_ids": to_device(flat[None], device), **packed_inputs(layout, device)}
        num_tokens = len(flat)
    supervised = [np.arange(stop - len(target), stop) for stop, target in zip(stops, targets)]
    return MicroBatch(
        inputs,
        to_device(np.concatenate(supervised).astype(np.int64), device),
        to_device(labels, device),
        token_index,
        np.asarray(samples),
        num_tokens if len(samples) else 0,
    )
