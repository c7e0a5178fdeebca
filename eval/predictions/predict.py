"""Scores the samples that are not scored yet and joins the parts, whose rules are in parts.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eval.loading import Subject
from eval.predictions.options import ScoringOptions
from eval.predictions.parts import adapter_hash, join_parts, read_parts, score_into
from eval.predictions.rows import relevance_group
from eval.predictions.scorer import SampleScorer
from gdrt_ds.data.corpus import Sample
from gdrt_ds.runtime import Runtime

BATCHES_PER_WINDOW = 16

KeptScores = dict[tuple[str, ...], np.ndarray]


def scoring_key(subject: Subject, options: ScoringOptions) -> dict[str, Any]:
    """What predictions depend on; saved as scoring.json and compared at a restart."""
    recommender = subject.recommender
    trie = recommender.trie
    beam = options.mode == "beam"
    return {
        "model": recommender.loaded.fingerprint,
        "adapter": adapter_hash(recommender.adapter),
        "prompt": recommender.encoder.template.fingerprint,
        "max_length": recommender.encoder.max_length,
        "catalogue": hashlib.sha256(trie.token.tobytes() + trie.parent.tobytes()).hexdigest(),
        "corpus": subject.corpus.fingerprint,
        "split": subject.split,
        "limit": subject.limit,
        "mode": options.mode,
        "scoring": options.scoring,
        "k": options.k,
        "beams": options.beams if beam else None,
        "length_penalty": options.length_penalty if beam else None,
        "max_nodes": options.max_nodes if options.mode == "best_first" else None,
        "dtype": str(recommender.reader.mask_dtype).removeprefix("torch."),
    }


def predict(
    subject: Subject,
    options: ScoringOptions,
    output: Path,
    runtime: Runtime,
    progress: Callable[[int, int], None],
    keep: frozenset[int] = frozenset(),
) -> tuple[list[dict[str, Any]] | None, KeptScores]:
    """Scores what is missing and joins the parts.

    Args:
        progress: called with (finished, all) samples of this rank.
        keep: ids of samples whose scores are wanted back.
    Returns:
        predictions in the split's order on rank 0 and None on other ranks; and, by history, the scores
        [items] of those samples of `keep` that this rank scored now.
    Raises:
        UserError: samples are missing at the end, because a rank ended early.
    """
    parts = output / "parts"
    required = "nll_at_temperatures" if options.exact else None
    done = read_parts(parts, required)
    outdated = len(read_parts(parts)) - len(done)
    if outdated and runtime.is_main:
        print(
            f"{outdated} samples were scored by an earlier version, without {required}: scored again",
            flush=True,
        )
    missing = [sample for sample in subject.samples if sample.sample_id not in done]
    if missing and runtime.is_main:
        ranks = f" on {runtime.world} ranks" if runtime.world > 1 else ""
        finished = f" ({len(done)} are finished)" if done else ""
        print(
            f"scoring: {len(missing)} samples{finished} against {len(subject.catalogue)} titles{ranks}",
            flush=True,
        )
    runtime.barrier()  # every rank has read the parts before any rank appends
    mine = missing[runtime.rank :: runtime.world]
    kept: KeptScores = {}
    if mine:
        scorer = SampleScorer(subject, options, keep)
        lengths = [len(subject.recommender.prompt_of(sample.history)) for sample in mine]
        batches = _batches(mine, lengths, options.batch_size)
        score_into(output, batches, scorer.score, runtime, progress, len(mine))
        kept = scorer.kept
    runtime.barrier()
    if not runtime.is_main:
        return None, kept
    ids = [sample.sample_id for sample in subject.samples]

    def with_own_group(row: dict[str, Any]) -> dict[str, Any]:
        # Parts of a base model may come from another run's evaluation of it, which had its own groups.
        return {**row, "relevance_group": relevance_group(subject, row["target_id"])}

    return join_parts(output, ids, "samples", required, with_own_group), kept


def _batches(samples: list[Sample], lengths: list[int], size: int) -> Iterator[list[Sample]]:
    """Batches of prompts of similar length, because padding is computed too.

    Samples are sorted inside windows of 16 batches, so that the progress stays even.
    """
    window = BATCHES_PER_WINDOW * size
    for start in range(0, len(samples), window):
        block = range(start, min(start + window, len(samples)))
        by_length = sorted(block, key=lambda index: (lengths[index], index))
        for low in range(0, len(by_length), size):
            yield [samples[index] for index in by_length[low : low + size]]
