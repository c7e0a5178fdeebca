"""Relevance: log p_ref(target token | auxiliary tokens only), the score that GDRT groups by.

It depends on the auxiliary prompt and the target alone, so every different pair of them is an entry that is
scored once. In recommendation all prompts without their history are the same: an entry is a title of the
catalogue. What all auxiliary prompts begin with is one shared prefix. Ranks take turns over the
micro-batches; one all-reduce at the end puts the parts together.

`corpus_scores` needs no model: it counts how often train targets go on from a title's prefix with each token.
No predictor without the history has a lower train loss, so this is where every auxiliary_sft reference is
heading (our choice, `groups.reference=corpus`).

The table is cached under a fingerprint of model, prompt, catalogue and reference, so that runs share it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gdrt_ds.batches import MicroBatch, build_micro_batch
from gdrt_ds.data.prompts import TokenStore, common_head
from gdrt_ds.errors import UserError
from gdrt_ds.files import set_usual_mode
from gdrt_ds.runtime import Runtime

TABLE_VERSION = 2  # 1 read the first token of a title at the end of the title before it


def score_entries(
    store: TokenStore,
    token_losses: Callable[[MicroBatch], torch.Tensor],
    runtime: Runtime,
    *,
    packing: str,
    pad_id: int,
    tokens_per_batch: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Returns r for every target token of every entry.

    Args:
        store: one sample per entry (`TrainingData.auxiliary`).
        token_losses: a no-grad forward that returns [N] negative log-probabilities of a micro-batch under the
            reference.
        packing: of the run. Entries share one prefix in the rows of shared_prefix and prefix_tree.

    Returns:
        float32[target tokens], r = -loss, the same on every rank.
    """
    head = common_head(store)
    if packing == "prefix_tree":
        packing = "shared_prefix"
    # A row of `packed` shares nothing: flash-attn, which it may go to, cannot.
    own = store.lengths - head if packing == "shared_prefix" else store.lengths
    parts = [[]]
    load = 0
    for entry in np.argsort(own, kind="stable"):
        if parts[-1] and load + own[entry] > tokens_per_batch:
            parts.append([])
            load = 0
        parts[-1].append(int(entry))
        load += own[entry]
    rounds = -(-len(parts) // runtime.world)
    scores = torch.zeros(int(store.target_offsets[-1]), dtype=torch.float64)
    for index in range(rounds):
        mine = index * runtime.world + runtime.rank
        members = np.array(sorted(parts[mine]) if mine < len(parts) else [], dtype=np.int64)
        micro = build_micro_batch(store, members, packing, head, pad_id, runtime.device)
        losses = token_losses(micro)
        scores[micro.token_index] = -losses.detach().double().cpu()
        if progress is not None:
            progress(index + 1, rounds)
    scores = scores.to(runtime.device)
    if dist.is_initialized() and runtime.world > 1:
        dist.all_reduce(scores)
    values = scores.cpu().numpy().astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(
            f"the reference model gives NaN or inf for {int((~np.isfinite(values)).sum())} of {len(values)} "
            "target tokens",
            "check model.path and model.dtype: float16 overflows on some models, bfloat16 does not",
        )
    return values


def corpus_scores(store: TokenStore, train_counts: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Returns r from counting.

    r is the log of (train targets that continue the prefix with this token + 1) / (train targets
    with the prefix + continuations). One is added to every continuation that the known entries have, so
    that titles unseen in train have a finite r. Another continuation counts as one train target.

    Args:
        store: one sample per entry. Prompts may differ; tokens are counted behind equal prompts.
        train_counts: int[entries], how many train samples have an entry.
        known: bool[entries], whose continuations there are; None = all, as in a catalogue.

    Returns:
        float32[target tokens]; 0 where the known entries leave no choice, and behind a prefix that none has.
    """
    # A prefix is a node of a tree, whose root is its prompt: (node, next token) -> node.
    nodes: dict[tuple[int, int], int] = {}
    roots: dict[bytes, int] = {}
    parents: list[int] = []
    paths = []
    for start, stop, length in zip(store.offsets, store.offsets[1:], store.num_target):
        prompt = store.input_ids[start : stop - length].tobytes()
        path = [roots.setdefault(prompt, -1 - len(roots))]
        for token in store.input_ids[stop - length : stop].tolist():
            key = (path[-1], token)
            if key not in nodes:
                nodes[key] = len(nodes)
                parents.append(path[-1])
            path.append(nodes[key])
        paths.append(path)
    # The roots, -1, -2 and so on, count from the end.
    total = len(nodes) + len(roots)
    passed = np.zeros(total, dtype=np.int64)
    is_known = np.zeros(total, dtype=bool)
    listed = [True] * len(paths) if known is None else known.tolist()
    for path, count, there in zip(paths, train_counts.tolist(), listed, strict=True):
        passed[path] += count
        is_known[path] |= there
    parent = np.array(parents, dtype=np.int64)
    children = np.zeros(total, dtype=np.int64)  # continuations that the known entries have
    np.add.at(children, parent[is_known[: len(nodes)]], 1)
    r = np.log((passed[: len(nodes)] + 1) / np.maximum(1, passed[parent] + children[parent]))
    order = np.array([node for path in paths for node in path[1:]], dtype=np.int64)
    return r[order].astype(np.float32)


def fingerprint(*parts: str) -> str:
    """Returns a SHA-256 of what the table depends on: base, prompt template, catalogue, reference."""
    return hashlib.sha256(json.dumps([TABLE_VERSION, *parts]).encode()).hexdigest()


def store_digest(store: TokenStore) -> str:
    return hashlib.sha256(store.input_ids.tobytes() + store.num_target.tobytes()).hexdigest()


def load_cached(folder: Path, key: str, num_tokens: int) -> np.ndarray | None:
    """Returns the table of an earlier run with the same fingerprint, or None.

    A file that cannot be read counts as none: it can be scored again, and a crash may have left it torn.
    """
    path = folder / f"relevance-{key[:20]}.safetensors"
    try:
        table = load_file(path)["r"]
    except (OSError, SafetensorError, KeyError):
        return None
    return table if len(table) == num_tokens else None


def save_cached(folder: Path, key: str, table: np.ndarray) -> None:
    """Saves the table in one piece, so that a run that starts meanwhile sees all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"relevance-{key[:20]}.safetensors"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"r": table}, temporary)
    set_usual_mode(temporary)
    os.replace(temporary, path)
