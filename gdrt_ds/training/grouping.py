"""Gives every target token its group: relevance under the reference, bins or labels, one array per split.

This is where `groups.*` is carried out. What a group is stands in gdrt_ds/dro/groups.py, what relevance is in
gdrt_ds/dro/relevance.py; here the engine scores, the cache answers, and the run folder keeps the result.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save_file

from gdrt_ds.batches import MicroBatch
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.data.token_facts import TokenFacts, whole
from gdrt_ds.data.training_data import Auxiliary
from gdrt_ds.dro import relevance
from gdrt_ds.dro.groups import GroupPlan, apply_groups, fit_groups
from gdrt_ds.files import cache_folder, replacing, set_usual_mode
from gdrt_ds.models.reference_adapters import AUXILIARY, adapter_digest, reference, reference_adapters
from gdrt_ds.training.agreement import agree, attempt
from gdrt_ds.training.job import Job
from gdrt_ds.training.loading import Loaded
from gdrt_ds.training.losses import token_losses
from gdrt_ds.training.preparation import Prepared
from gdrt_ds.training.telemetry import duration

MOST_TOKENS_WRITTEN = 50_000_000
"""Target tokens of train up to which groups.safetensors lists them one by one; 22 bytes and more each."""


@dataclass(frozen=True)
class Relevance:
    """r of every target token of every entry, e.g. of every title of the catalogue.

    Attributes:
        values: float32[target tokens of all entries], log p(token | auxiliary prompt, target so far).
        auxiliary: the entries; the offsets of their store say which values are whose.
        key: fingerprint of all that the values depend on.
    """

    values: np.ndarray
    auxiliary: Auxiliary
    key: str

    @property
    def store(self) -> TokenStore:
        """One sample per entry."""
        return self.auxiliary.store


@dataclass(frozen=True)
class Grouped:
    """The group of every target token.

    Attributes:
        plan: bin edges or labels, fitted on train.
        groups: split -> int16[target tokens of the split], an array or `TokenFacts`.
        scores: what the bins are over; None where groups come from labels, counts or places.
        train_relevance: float32[train target tokens] by entry, or None likewise.
    """

    plan: GroupPlan
    groups: dict[str, np.ndarray | TokenFacts]
    scores: Relevance | None
    train_relevance: TokenFacts | None

    @property
    def relevance(self) -> np.ndarray | None:
        """The values of `scores`."""
        return None if self.scores is None else self.scores.values

    @property
    def digest(self) -> str:
        """SHA-256 of the groups of the train tokens, or of the table that they are looked up in.

        Empty where a model's scores decide: on other hardware they differ in the last digits, and a token on
        an edge may fall to its other side.
        """
        if self.scores is not None or "train" not in self.groups:
            return ""
        groups = self.groups["train"]
        table = groups.table if isinstance(groups, TokenFacts) else groups
        return hashlib.sha256(np.ascontiguousarray(table)).hexdigest()


def relevance_cache() -> Path:
    """Shared by all runs of this user; the fingerprint in a file's name tells tables apart."""
    return cache_folder() / "relevance"


def group_tokens(
    job: Job,
    prepared: Prepared,
    loaded: Loaded,
    on_progress: Callable[[], None],
    saved_plan: GroupPlan | None = None,
    saved_table: np.ndarray | None = None,
) -> Grouped:
    """Scores relevance where it is needed, fits the groups on train, applies them to every split.

    Args:
        on_progress: called after every scored micro-batch.
        saved_plan, saved_table: of a checkpoint, for groups.reference=live: the model that gave this table
            was the one at the last refresh, which cannot be scored again.
    Raises:
        UserError: a label that the data lacks, more groups than distinct values.
    """
    section = job.config.groups
    scores = None
    if section.by in ("relevance", "random"):
        scores = score_relevance(job, prepared, loaded, on_progress, saved_table)
    train_relevance = _relevance_of(prepared, scores, "train")
    plan = saved_plan
    if plan is None:
        plan = fit_groups(
            section,
            prepared.data,
            train_relevance,
            job.config.train.seed,
            "" if scores is None else scores.key,
        )
    groups = {}
    for split in prepared.stores:
        relevance_of_split = _relevance_of(prepared, scores, split)
        groups[split] = apply_groups(plan, section, prepared.data, relevance_of_split, split)
    return Grouped(plan, groups, scores, train_relevance)


def _relevance_of(prepared: Prepared, scores: Relevance | None, split: str) -> TokenFacts | None:
    """float32[target tokens of the split], or None."""
    if scores is None:
        return None
    return scores.auxiliary.facts(scores.values, split, prepared.stores[split])


def score_relevance(
    job: Job,
    prepared: Prepared,
    loaded: Loaded,
    on_progress: Callable[[], None],
    saved_table: np.ndarray | None = None,
) -> Relevance:
    """r under `groups.reference`.

    From a checkpoint, from counting, from the cache, or from a pass of the model.
    """
    reference_name = job.config.groups.reference
    auxiliary = prepared.data.auxiliary()
    store = auxiliary.store
    key = _fingerprint(job, prepared, loaded, store)
    what = f"{int(store.target_offsets[-1]):,} target tokens of {len(store):,} {auxiliary.what}"
    if reference_name == "live" and saved_table is not None:
        return Relevance(saved_table, auxiliary, key)
    if reference_name == "corpus":
        job.say(f"relevance: {what} from train frequencies")
        values = relevance.corpus_scores(store, auxiliary.train_counts(), auxiliary.known())
        return Relevance(values, auxiliary, relevance.fingerprint(key, prepared.stores["train"].fingerprint))
    if reference_name != "live":
        cached = _cached_on_every_rank(job, key, int(store.target_offsets[-1]))
        if cached is not None:
            job.say(f"relevance: {what} from the cache ({key[:12]})")
            return Relevance(cached, auxiliary, key)
    started = time.time()
    job.say(f"relevance: scoring {what} under `{reference_name}`")
    values = _score_with_model(job, prepared, loaded, store, on_progress)
    if job.runtime.is_main and reference_name != "live":
        _keep_for_other_runs(job, key, values)
    job.say(f"relevance: {what} under `{reference_name}` in {duration(time.time() - started)}")
    return Relevance(values, auxiliary, key)


def _keep_for_other_runs(job: Job, key: str, values: np.ndarray) -> None:
    """Writes the table into the cache. A run does not end because others would have to score again."""
    problem = attempt(lambda: relevance.save_cached(relevance_cache(), key, values))
    if problem:
        job.say(
            f"relevance: not kept for other runs, the cache {relevance_cache()} cannot be written: {problem}"
        )


def _fingerprint(job: Job, prepared: Prepared, loaded: Loaded, store: TokenStore) -> str:
    adapter = ""
    if job.config.groups.reference == "auxiliary_sft":
        adapter = adapter_digest(reference_adapters(job.config)[AUXILIARY])
    return relevance.fingerprint(
        loaded.base.fingerprint,
        prepared.data.prompt_fingerprint,
        relevance.store_digest(store),
        job.config.groups.reference,
        adapter,
    )


def _cached_on_every_rank(job: Job, key: str, num_tokens: int) -> np.ndarray | None:
    """The cached table if every rank can read it, and then that of rank 0.

    A rank that scored while others do not would wait for ever. Nodes with caches of their own may have scored
    in other ways, on another GPU or in another packing: their tables differ in the last digits, and ranks
    must not have other groups than their peers.
    """
    cached = relevance.load_cached(relevance_cache(), key, num_tokens)
    if job.runtime.world == 1:
        return cached
    own = -1 if cached is None else int(hashlib.sha256(cached.tobytes()).hexdigest()[:12], 16)
    seen = torch.tensor([own, -own], dtype=torch.float64, device=job.runtime.device)
    dist.all_reduce(seen, op=dist.ReduceOp.MIN)
    smallest, largest = int(seen[0]), -int(seen[1])
    if smallest < 0:
        return None
    if smallest != largest:
        job.say("relevance: the caches of the nodes hold other values; all ranks take those of rank 0")
        table = torch.from_numpy(cached).to(job.runtime.device)
        dist.broadcast(table, 0)
        return table.cpu().numpy()
    return cached


def _score_with_model(
    job: Job, prepared: Prepared, loaded: Loaded, store: TokenStore, on_progress: Callable[[], None]
) -> np.ndarray:
    device, engine = job.runtime.device, loaded.engine
    kind = job.config.groups.reference

    def losses(micro: MicroBatch) -> torch.Tensor:
        if kind == "live":
            return token_losses(engine, micro, device)
        with reference(loaded.base.model, AUXILIARY if kind == "auxiliary_sft" else None):
            return token_losses(engine, micro, device)

    def progress(done: int, total: int) -> None:
        on_progress()
        if done == total or done % max(1, total // 4) == 0:
            job.say(f"relevance: {done}/{total} micro-batches")

    engine.eval()
    values = relevance.score_entries(
        store,
        losses,
        job.runtime,
        packing=loaded.packing,
        pad_id=prepared.tokenizer.pad_token_id,
        progress=progress,
    )
    engine.train()
    return values


def save_groups(job: Job, prepared: Prepared, grouped: Grouped) -> None:
    """Writes groups.json and groups.safetensors into the run folder. Every rank calls it, rank 0 writes.

    Of a very large train split, groups.safetensors has what there is for each title, and no list of tokens.

    Raises:
        StorageError: on every rank, if they could not be written.
    """
    problem = attempt(lambda: _write_groups(job, prepared, grouped), on=job.runtime.is_main)
    agree(job.runtime, problem, job.folder / ".groups.tmp", what="groups.safetensors")


def _write_groups(job: Job, prepared: Prepared, grouped: Grouped) -> None:
    grouped.plan.save(job.folder / "groups.json")
    store = prepared.stores["train"]
    tensors = {}
    if int(store.target_offsets[-1]) <= MOST_TOKENS_WRITTEN:
        if not store.rows_change:
            tensors["sample_offsets"] = store.offsets
        tensors["token_offsets"] = store.target_offsets
        tensors["group"] = whole(grouped.groups["train"])
        if grouped.scores is not None:
            tensors["r"] = whole(grouped.train_relevance)
    if grouped.scores is not None:
        tensors["entry_offsets"] = grouped.scores.store.target_offsets
        tensors["entry_r"] = grouped.scores.values
    with replacing(job.folder / "groups.safetensors") as scratch:
        save_file(
            {name: np.ascontiguousarray(value) for name, value in tensors.items()},
            scratch,
            metadata={"fingerprint": grouped.plan.fingerprint},
        )
        set_usual_mode(scratch)
