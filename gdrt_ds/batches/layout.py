"""Lays the samples of a micro-batch out as tensors.

They become padded rows, or one packed row in which samples may share the prompt's start, or all their common
prefixes.

Shapes: B samples, T positions, N supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gdrt_ds.batches.prefix_tree import merge_prefixes
from gdrt_ds.batches.token_keys import PADDING_KEY, token_keys
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
        samples: the sample of each row.
        num_tokens: tokens computed that are not padding.
        keys: Long[B, T], stands for each token and all before it in its sample (token_keys.py).
    """

    inputs: dict
    supervised: Tensor
    labels: Tensor
    token_index: np.ndarray
    samples: np.ndarray
    num_tokens: int
    keys: Tensor

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
            move(self.keys),
        )


def build_micro_batch(
    store: TokenStore,
    samples: np.ndarray,
    packing: str,
    prefix_length: int,
    pad_id: int,
    device: torch.device | str = "cpu",
    entropy: int = 0,
) -> MicroBatch:
    """Lays samples out in the chosen packing.

    The position before a token predicts it: inputs are a sample's tokens 0 .. T-2, labels its last num_target
    tokens. An empty slot becomes one dummy token with nothing supervised, so that every rank runs the same
    collectives.

    Args:
        store: the tokenised split.
        samples: indices into it.
        packing: none, packed, shared_prefix or prefix_tree.
        prefix_length: tokens that all prompts begin with, for shared_prefix.
        pad_id: fills padded rows and empty slots.
        device: where the tensors go.
        entropy: of the keys, see `token_keys.step_entropy`.

    Raises:
        UserError: shared_prefix, and a position of the shared tokens predicts a target token.
    """
    whole = store.rows(samples)
    rows = [row[:-1].astype(np.int64) for row in whole]
    owners = store.sample_of(samples)
    num_target = [int(store.num_target[s]) for s in owners]
    spans = [np.arange(store.target_offsets[s], store.target_offsets[s + 1]) for s in owners]
    labels = [row[-n:] for row, n in zip(whole, num_target, strict=True)]
    if not rows:
        rows, num_target = [np.array([pad_id], dtype=np.int64)], [0]
    if packing == "none":
        inputs, paths, num_tokens = _padded(rows, pad_id, device)
    elif packing == "prefix_tree":
        inputs, paths, num_tokens = _tree(rows, device)
    else:
        shared = prefix_length if packing == "shared_prefix" and len(samples) else 0
        inputs, paths, num_tokens = _packed(rows, num_target, shared, device)
    supervised = [path[len(path) - n :] for path, n in zip(paths, num_target, strict=True)]
    return MicroBatch(
        inputs,
        to_device(np.concatenate(supervised), device),
        to_device(_joined(labels), device),
        _joined(spans),
        owners,
        num_tokens if len(samples) else 0,
        to_device(_keys(rows, paths, inputs["input_ids"].shape, entropy), device),
    )


Laid = tuple[dict, list[np.ndarray], int]
"""Inputs of the backbone, where every row's tokens stand in the flattened hidden states, tokens computed."""


def _padded(rows: list[np.ndarray], pad_id: int, device: torch.device | str) -> Laid:
    """One row per sample, filled up to the longest."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
        mask[b, : len(row)] = 1
    inputs = {
        "input_ids": to_device(ids, device),
        "attention_mask": to_device(mask, device),
        "position_ids": torch.arange(width, device=device).expand(len(rows), -1),
    }
    paths = [np.arange(b * width, b * width + len(row)) for b, row in enumerate(rows)]
    return inputs, paths, int(mask.sum())


def _packed(rows: list[np.ndarray], num_target: list[int], shared: int, device: torch.device | str) -> Laid:
    """One row for all samples, one behind the other, behind the `shared` tokens that they have in common."""
    bodies = [len(row) - shared for row in rows]
    if any(count > body for count, body in zip(num_target, bodies)):
        raise UserError(
            f"the shared head of {shared} tokens holds a position that predicts a target token, and each "
            "sample needs its own",
            "give the prompt template some text after the history (after_history), or set "
            "train.packing=packed",
        )
    layout = TreeLayout.build(bodies, shared, device)
    flat = np.concatenate([rows[0][:shared]] + [row[shared:] for row in rows])
    inputs = {"input_ids": to_device(flat[None], device), **packed_inputs(layout, device)}
    stops = shared + np.cumsum(bodies)
    head = np.arange(shared)
    paths = [np.concatenate([head, np.arange(stop - body, stop)]) for stop, body in zip(stops, bodies)]
    return inputs, paths, len(flat)


def _tree(rows: list[np.ndarray], device: torch.device | str) -> Laid:
    """One row for all samples, whose common prefixes stand there once."""
    tree = merge_prefixes(rows)
    layout = TreeLayout.of_tree(tree, device)
    inputs = {"input_ids": to_device(tree.tokens[None], device), **packed_inputs(layout, device)}
    return inputs, tree.paths, len(tree.tokens)


def _keys(rows: list[np.ndarray], paths: list[np.ndarray], shape: torch.Size, entropy: int) -> np.ndarray:
    """int64[B, T]: where samples share a token, they agree on its key."""
    keys = np.full(shape.numel(), PADDING_KEY, dtype=np.int64)
    for row, path in zip(rows, paths, strict=True):
        keys[path] = token_keys(row, entropy)
    return keys.reshape(shape)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    """int64, one behind the other."""
    if not arrays:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate(arrays).astype(np.int64)
