"""Scores what is missing and joins the parts.

Every rank appends finished samples to its own file in OUTPUT/parts/. A restart reads all parts, whatever the
number of ranks was, and goes on with what is missing. `scoring.json` beside them names what the scores depend
on; parts of another model, prompt, catalogue or mode are refused, never mixed. At the end rank 0 writes
predictions.jsonl in the split's order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eval.folders import PREDICTIONS, current_scoring_key
from eval.loading import Subject
from eval.predictions.options import ScoringOptions
from eval.predictions.scorer import SampleScorer
from gdrt_ds.data.corpus import Sample
from gdrt_ds.errors import UserError
from gdrt_ds.files import sha256_of, write_json, write_text
from gdrt_ds.runtime import Runtime

BATCHES_PER_WINDOW = 16

KeptScores = dict[tuple[str, ...], np.ndarray]


def scoring_key(subject: Subject, options: ScoringOptions) -> dict[str, Any]:
    """What predictions depend on; saved as scoring.json and compared at a restart."""
    recommender = subject.recommender
    adapter = ""
    if recommender.adapter is not None:
        adapter = sha256_of(recommender.adapter / "adapter_model.safetensors")
    trie = recommender.trie
    beam = options.mode == "beam"
    return {
        "model": recommender.loaded.fingerprint,
        "adapter": adapter,
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
        "max_nodes": options.max_nodes,
        "dtype": str(recommender.reader.mask_dtype).removeprefix("torch."),
    }


def claim_output(output: Path, key: dict[str, Any], overwrite: bool) -> None:
    """Makes OUTPUT ready: fresh, or with parts of the same job.

    Args:
        key: from `scoring_key`. overwrite: drop the parts of another job instead of refusing them.
    Raises:
        UserError: it holds another job's results, or cannot be written.
    """
    try:
        (output / "parts").mkdir(parents=True, exist_ok=True)
        saved = output / "scoring.json"
        if overwrite:
            for path in (output / "parts").glob("rank_*.jsonl"):
                path.unlink()
        elif saved.is_file():
            _refuse_other_job(output, json.loads(saved.read_text(encoding="utf-8")), key)
        write_json(saved, key)
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written ({error.strerror or error})",
            "choose another folder, or free space",
        ) from None


def _refuse_other_job(output: Path, saved: dict[str, Any], key: dict[str, Any]) -> None:
    before = current_scoring_key(saved)
    if before != saved:
        print(
            f"{output}/scoring.json of an earlier version: its `objective` is read as `scoring`", flush=True
        )
    differing = [name for name in key if before.get(name) != key[name]]
    if differing:
        raise UserError(
            f"--output {output} holds predictions with another {', '.join(differing)}",
            "choose another --output, or give --overwrite",
        )


def read_parts(folder: Path, required: str | None = None) -> dict[int, dict[str, Any]]:
    """Finished samples of all parts by sample id.

    Left out are a torn line (the process was killed while it wrote) and rows without the key `required` (an
    earlier version wrote them).
    """
    found = {}
    for path in sorted(folder.glob("rank_*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if required is None or required in row:
                found[row["sample_id"]] = row
    return found


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
            f"scoring: {len(missing)} users{finished} against {len(subject.catalogue)} titles{ranks}",
            flush=True,
        )
    runtime.barrier()  # every rank has read the parts before any rank appends
    mine = missing[runtime.rank :: runtime.world]
    kept: KeptScores = {}
    if mine:
        scorer = SampleScorer(subject, options, keep)
        _score_into(parts / f"rank_{runtime.rank}.jsonl", scorer, mine, runtime, progress)
        kept = scorer.kept
    runtime.barrier()
    if not runtime.is_main:
        return None, kept
    return _join(subject, output, required), kept


def _score_into(
    part: Path,
    scorer: SampleScorer,
    samples: list[Sample],
    runtime: Runtime,
    progress: Callable[[int, int], None],
) -> None:
    """Appends the predictions of `samples` to a rank's file, batch by batch.

    Raises:
        KeyboardInterrupt: the process was asked to stop; what is finished is on disk.
    """
    lengths = [len(scorer.subject.recommender.prompt_of(sample.history)) for sample in samples]
    torn = part.is_file() and part.stat().st_size > 0 and not part.read_bytes().endswith(b"\n")
    finished = 0
    with open(part, "a", encoding="utf-8") as stream:
        if torn:
            # A killed process left half a line: what follows must not be glued to it.
            stream.write("\n")
        for batch in _batches(samples, lengths, scorer.options.batch_size):
            stream.write(_json_lines(scorer.score(batch)))
            stream.flush()
            finished += len(batch)
            progress(finished, len(samples))
            if runtime.stop_signal is not None:
                raise KeyboardInterrupt


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


def _join(subject: Subject, output: Path, required: str | None) -> list[dict[str, Any]]:
    """Writes predictions.jsonl from all parts and returns its rows."""
    done = read_parts(output / "parts", required)
    absent = [sample.sample_id for sample in subject.samples if sample.sample_id not in done]
    if absent:
        raise UserError(
            f"{len(absent)} samples have no predictions (a rank ended early), e.g. sample {absent[0]}",
            "start the same command again: it goes on where it ended",
        )
    rows = [done[sample.sample_id] for sample in subject.samples]
    write_text(output / PREDICTIONS, _json_lines(rows))
    return rows


def _json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
