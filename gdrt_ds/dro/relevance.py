"""Relevance: log p_ref(target token | auxiliary tokens only), the score that GDRT groups by.

Without the history every prompt is the same, so r depends on the catalogue entry and on the place
in its title alone. One pass over the catalogue scores every target token of every sample, and the
auxiliary prompt but its last token is one shared prefix. Ranks take turns over the micro-batches;
one all-reduce at the end puts the parts together.

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
from safetensors.numpy import load_file, save_file

from gdrt_ds.batches import MicroBatch, build_micro_batch
from gdrt_ds.data.prompts import PromptEncoder, TokenStore
from gdrt_ds.errors import UserError
from gdrt_ds.runtime import Runtime

TABLE_VERSION = 2  # 1 read the first token of a title at the end of the title before it


def entry_store(encoder: PromptEncoder, texts: list[str]) -> TokenStore:
    """Makes one history-free sample per catalogue entry."""
    encoded = [encoder.encode([], text, mask_history=True) for text in texts]
    num_target = np.array([e.num_target for e in encoded], dtype=np.int32)
    return TokenStore(
        input_ids=np.concatenate([e.input_ids for e in encoded]).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(e.input_ids) for e in encoded])]).astype(np.int64),
        segments=np.concatenate([e.segments for e in encoded]).astype(np.int8),
        num_target=num_target,
        target_offsets=np.concatenate([[0], np.cumsum(num_target)]).astype(np.int64),
    )


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
        store: what `entry_store` returns.
        token_losses: a no-grad forward that returns [N] negative log-probabilities of a micro-batch under the
            reference.

    Returns:
        float32[target tokens], r = -loss, the same on every rank.
    """
    # The last prompt token predicts the first target token, so each entry has its own copy of it; what comes
    # before is shared.
    head = int(store.offsets[1] - store.offsets[0] - store.num_target[0]) - 1
    packing = "shared_prefix" if packing != "none" else "none"
    own = store.num_target + 1
    if packing == "none":
        own = own + head
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


def corpus_scores(store: TokenStore, train_counts: np.ndarray) -> np.ndarray:
    """Returns r from counting.

    r is the log of (train targets that continue the prefix with this token + 1) / (train targets
    with the prefix + continuations). One is added to every continuation that the catalogue has, so
    that titles unseen in train have a finite r.

    Args:
        store: what `entry_store` returns.
        train_counts: int[entries], how often an entry is the target of a train sample.

    Returns:
        float32[target tokens]; 0 where the catalogue leaves no choice.
    """
    passed: dict[tuple[int, ...], int] = {}
    children: dict[tuple[int, ...], set[int]] = {}
    titles = [
        tuple(store.input_ids[stop - length : stop].tolist())
        for stop, length in zip(store.offsets[1:], store.num_target)
    ]
    for title, count in zip(titles, train_counts.tolist()):
        for length in range(len(title) + 1):
            passed[title[:length]] = passed.get(title[:length], 0) + count
            if length < len(title):
                children.setdefault(title[:length], set()).add(title[length])
    r = [
        np.log((passed[title[: i + 1]] + 1) / (passed[title[:i]] + len(children[title[:i]])))
        for title in titles
        for i in range(len(title))
    ]
    return np.array(r, dtype=np.float32)


def fingerprint(*parts: str) -> str:
    """Returns a SHA-256 of what the table depends on: base, prompt template, catalogue, reference."""
    return hashlib.sha256(json.dumps([TABLE_VERSION, *parts]).encode()).hexdigest()


def store_digest(store: TokenStore) -> str:
    return hashlib.sha256(store.input_ids.tobytes() + store.num_target.tobytes()).hexdigest()


def load_cached(folder: Path, key: str, num_tokens: int) -> np.ndarray | None:
    """Returns the table of an earlier run with the same fingerprint, or None."""
    path = folder / f"relevance-{key[:20]}.safetensors"
    if not path.is_file():
        return None
    table = load_file(path)["r"]
    return table if len(table) == num_tokens else None


def save_cached(folder: Path, key: str, table: np.ndarray) -> None:
    """Saves the table in one piece, so that a run that starts meanwhile sees all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"relevance-{key[:20]}.safetensors"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"r": table}, temporary)
    os.replace(temporary, path)
