"""Scores the samples of a subject and writes predictions: in batches, over ranks, resumable, with progress.

Every rank appends finished samples to its own file in OUTPUT/parts/; a restart reads all parts, whatever the number of
ranks was, and goes on with what is missing. `scoring.json` beside them names what the scores depend on; parts of another
model, prompt, catalogue or mode are refused, never mixed. At the end rank 0 writes predictions.jsonl in the split's order.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch

from eval.loading import Subject
from eval.metrics.calibration import nll_curve
from eval.scoring import (
    BestFirst,
    beam_search,
    expected_rank,
    num_tied,
    path_scores,
    per_item_scores,
    top_entries,
)
from gdrt_ds.data.corpus import Sample
from gdrt_ds.errors import UserError
from gdrt_ds.inference.catalogue_scoring import OBJECTIVES, CatalogueScorer

MODES = ("renormalised", "full", "best_first", "beam")
# Largest difference to per-item scoring at the start of a scoring job, in nats. fp32 rounding of a title stays below 1e-3
# on every family tried; a wrong mask or position gives tenths and more. Half precision rounds logits to 1/64 and less.
CHECK_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 1.0, torch.float16: 0.3}


@dataclass(frozen=True)
class ScoringOptions:
    """How to score.

    Attributes:
        mode: `renormalised` or `full` = exact over the whole catalogue under that objective; `best_first` = certified
            exact top-k; `beam` = constrained beam search.
        objective: of best_first and beam; in the exact modes it is the mode.
        k: length of the lists. beams: width in beam mode. length_penalty: of beam mode (HF's default is 1).
        batch_size: users at once. max_score_bytes: bound on working memory.
        max_nodes: best_first gives up certification after this many nodes per user; None = never.
    """

    mode: str = "renormalised"
    objective: str = "renormalised"
    k: int = 50
    batch_size: int = 8
    max_score_bytes: int = 2 << 30
    beams: int = 10
    length_penalty: float = 0.0
    max_nodes: int | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"--mode {self.mode} is unknown", f"choose one of {', '.join(MODES)}")
        if self.objective not in OBJECTIVES:
            raise UserError(
                f"--objective {self.objective} is unknown", f"choose one of {', '.join(OBJECTIVES)}"
            )
        for name in ("k", "batch_size", "beams", "max_score_bytes"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is too small", "give at least 1"
                )
        if self.mode in OBJECTIVES:
            object.__setattr__(self, "objective", self.mode)


def item_order(subject: Subject) -> np.ndarray:
    """A rank per entry by item id: breaks ties in lists without regard to the catalogue's order."""
    order = np.empty(len(subject.catalogue), np.int64)
    order[np.argsort([entry.item_id for entry in subject.catalogue.entries], kind="stable")] = np.arange(
        len(order)
    )
    return order


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def describe(
    subject: Subject,
    sample: Sample,
    *,
    rank: float | None,
    tied: int,
    top: np.ndarray,
    top_scores: np.ndarray,
    nll: float,
    curve: np.ndarray | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One object of predictions.jsonl. Ids are those of the catalogue's representatives; numbers that are not finite are null.

    Args:
        curve: `eval.metrics.calibration.nll_curve`, where the whole catalogue was scored.
    """
    catalogue = subject.catalogue
    name = lambda item: catalogue.entries[catalogue.index_of[item]].item_id  # noqa: E731
    target = catalogue.index_of[sample.target]
    group = None if subject.group_of_entry is None else int(subject.group_of_entry[target])
    return {
        "sample_id": sample.sample_id,
        "user_id": sample.user_id,
        "target_id": name(sample.target),
        "rank": rank,
        "num_tied": tied,
        "top_ids": [catalogue.entries[i].item_id for i in top.tolist()],
        "top_scores": [_number(s) for s in np.asarray(top_scores).tolist()],
        "target_nll": _number(nll),
        "history_ids": [name(item) for item in sample.history],
        "nll_at_temperatures": None if curve is None else [_number(round(v, 4)) for v in curve.tolist()],
        "user": subject.corpus.users.get(sample.user_id, {}),
        "labels": dict(sample.labels),
        "relevance_group": group,
        **extra,
    }


class SampleScorer:
    """Batches of samples -> predictions, in one of the modes.

    Args:
        keep: ids of samples whose scores stay in `kept` (exact modes): history -> log-probabilities of the catalogue [I].
    """

    def __init__(self, subject: Subject, options: ScoringOptions, keep: frozenset[int] = frozenset()):
        self.subject, self.options, self.keep = subject, options, keep
        self.kept: dict[tuple[str, ...], np.ndarray] = {}
        self.reader, self.trie = subject.recommender.reader, subject.recommender.trie
        self.order = item_order(subject)
        self.exact = (
            CatalogueScorer(self.reader, self.trie, options.objective, options.max_score_bytes)
            if options.mode in OBJECTIVES
            else None
        )
        self.search = (
            BestFirst(self.reader, self.trie, options.objective, options.max_nodes)
            if options.mode == "best_first"
            else None
        )

    def score(self, samples: list[Sample]) -> list[dict[str, Any]]:
        subject, k = self.subject, self.options.k
        prompts = [subject.recommender.prompt_of(s.history) for s in samples]
        targets = [subject.catalogue.index_of[s.target] for s in samples]
        if self.exact is not None:
            rows = self.exact.score(prompts).numpy()
            result = []
            for sample, target, scores in zip(samples, targets, rows):
                if sample.sample_id in self.keep:
                    self.kept[tuple(sample.history)] = scores.copy()
                top = top_entries(scores, k, self.order)
                result.append(
                    describe(
                        subject,
                        sample,
                        rank=expected_rank(scores, target),
                        tied=num_tied(scores, target),
                        top=top,
                        top_scores=scores[top],
                        nll=-scores[target],
                        curve=nll_curve(scores, target),
                        num_nan=int(np.isnan(scores).sum()),
                    )
                )
            return result
        self.reader.check_length(max(map(len, prompts)) + int(self.trie.depth.max()) - 1)
        state = self.reader.read(prompts)
        nll = -path_scores(self.reader, self.trie, state, targets, self.options.objective)
        if self.search is not None:
            return [
                self._of_search(s, t, found, value)
                for s, t, found, value in zip(samples, targets, self.search.search(state, k), nll)
            ]
        lists = beam_search(
            self.reader,
            self.trie,
            state,
            self.options.beams,
            self.options.objective,
            self.options.length_penalty,
        )
        return [
            self._of_list(s, t, entries, scores, value, len(entries))
            for s, t, (entries, scores), value in zip(samples, targets, lists, nll)
        ]

    def _of_list(
        self,
        sample: Sample,
        target: int,
        entries: np.ndarray,
        scores: np.ndarray,
        nll: float,
        proven: int,
        **extra: Any,
    ) -> dict[str, Any]:
        place = np.flatnonzero(entries[:proven] == target)
        rank = float(place[0] + 1) if len(place) else None
        return describe(
            self.subject,
            sample,
            rank=rank,
            tied=1,
            top=entries[: self.options.k],
            top_scores=scores[: self.options.k],
            nll=nll,
            **extra,
        )

    def _of_search(self, sample: Sample, target: int, found, nll: float) -> dict[str, Any]:
        return self._of_list(
            sample,
            target,
            found.entries,
            found.scores,
            nll,
            found.certified,
            certified=found.certified,
            nodes_expanded=found.expanded,
        )


def check_exactness(subject: Subject, options: ScoringOptions) -> str:
    """Compares tree scores with plain per-item scoring on the first sample: target and two other items. Returns a line.

    Raises:
        UserError: they differ: this architecture does something with masks or positions that scoring does not know.
    """
    recommender, sample = subject.recommender, subject.samples[0]
    entries = sorted({subject.catalogue.index_of[sample.target], 0, len(subject.catalogue) // 2})
    prompt = recommender.prompt_of(sample.history)
    state = recommender.reader.read([prompt])
    paths = torch.tensor(
        [
            float(path_scores(recommender.reader, recommender.trie, state, [e], options.objective)[0])
            for e in entries
        ]
    )
    found = per_item_scores(recommender.loaded.model, recommender.trie, prompt, entries, options.objective)
    if options.mode in OBJECTIVES:
        scorer = CatalogueScorer(
            recommender.reader, recommender.trie, options.objective, options.max_score_bytes
        )
        paths = scorer.score_state(state)[0, entries]
    if not bool(torch.isfinite(found).all()):
        return "check: the model gives NaN or infinite scores; they count as the worst rank"
    difference = float((paths.double() - found).abs().max())
    dtype = recommender.reader.mask_dtype
    if not difference <= CHECK_TOLERANCE.get(dtype, 1.0):
        raise UserError(
            f"scores of {type(recommender.loaded.model).__name__} in {dtype} differ by {difference:.3g} nats from scoring items one by one",
            "this model family is not supported by tree scoring (or the dtype is too coarse: set model.dtype=float32)",
        )
    return f"check: tree scores equal scoring items one by one within {difference:.1e} nats ({len(entries)} items, {str(dtype).removeprefix('torch.')})"


def scoring_key(subject: Subject, options: ScoringOptions) -> dict[str, Any]:
    """What predictions depend on; saved as scoring.json and compared at a restart."""
    recommender = subject.recommender
    adapter = ""
    if recommender.adapter is not None:
        adapter = hashlib.sha256((recommender.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    trie = hashlib.sha256(recommender.trie.token.tobytes() + recommender.trie.parent.tobytes()).hexdigest()
    return {
        "model": recommender.loaded.fingerprint,
        "adapter": adapter,
        "prompt": recommender.encoder.template.fingerprint,
        "max_length": recommender.encoder.max_length,
        "catalogue": trie,
        "corpus": subject.corpus.fingerprint,
        "split": subject.split,
        "limit": subject.limit,
        "mode": options.mode,
        "objective": options.objective,
        "k": options.k,
        "beams": options.beams if options.mode == "beam" else None,
        "length_penalty": options.length_penalty if options.mode == "beam" else None,
        "max_nodes": options.max_nodes,
        "dtype": str(recommender.reader.mask_dtype).removeprefix("torch."),
    }


def read_parts(folder: Path, required: str | None = None) -> dict[int, dict[str, Any]]:
    """Finished samples of all parts by sample id; a torn last line (the process was killed) is left out, and a row without the key
    `required` (an earlier version wrote it)."""
    found = {}
    for path in sorted(folder.glob("rank_*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if required is None or required in row:
                    found[row["sample_id"]] = row
    return found


def claim_output(output: Path, key: dict[str, Any], overwrite: bool) -> None:
    """Makes OUTPUT ready: fresh, or parts of the same job.

    Raises:
        UserError: it holds another job's results, or cannot be written.
    """
    try:
        (output / "parts").mkdir(parents=True, exist_ok=True)
        saved = output / "scoring.json"
        if saved.is_file() and not overwrite:
            before = json.loads(saved.read_text(encoding="utf-8"))
            differing = [name for name in key if before.get(name) != key[name]]
            if differing:
                raise UserError(
                    f"--output {output} holds predictions with another {', '.join(differing)}",
                    "choose another --output, or give --overwrite",
                )
        elif overwrite:
            for path in (output / "parts").glob("rank_*.jsonl"):
                path.unlink()
        saved.write_text(json.dumps(key, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written ({error.strerror or error})",
            "choose another folder, or free space",
        ) from None


def _batches(samples: list[Sample], lengths: list[int], size: int) -> Iterator[list[Sample]]:
    """Similar lengths together: padding is computed too. Windows of 16 batches keep the progress even."""
    for start in range(0, len(samples), 16 * size):
        block = sorted(range(start, min(start + 16 * size, len(samples))), key=lambda i: (lengths[i], i))
        for low in range(0, len(block), size):
            yield [samples[i] for i in block[low : low + size]]


def predict(
    subject: Subject,
    options: ScoringOptions,
    output: Path,
    runtime,
    progress,
    keep: frozenset[int] = frozenset(),
) -> tuple[list[dict[str, Any]] | None, dict[tuple[str, ...], np.ndarray]]:
    """Scores what is missing and joins the parts.

    Args:
        progress: called with (finished, all) samples of this rank.
        keep: ids of samples whose scores are wanted back.
    Returns:
        (predictions in the split's order on rank 0, None on other ranks; scores [I] by history of those of `keep` that this rank scored now).
    """
    kept: dict[tuple[str, ...], np.ndarray] = {}
    required = "nll_at_temperatures" if options.mode in OBJECTIVES else None
    done = read_parts(output / "parts", required)
    outdated = len(read_parts(output / "parts")) - len(done)
    if outdated and runtime.is_main:
        print(
            f"{outdated} samples were scored by an earlier version, without {required}: scored again",
            flush=True,
        )
    missing = [s for s in subject.samples if s.sample_id not in done]
    runtime.barrier()  # every rank has read the parts before any rank appends
    mine = missing[runtime.rank :: runtime.world]
    if mine:
        scorer = SampleScorer(subject, options, keep)
        kept = scorer.kept
        lengths = [len(subject.recommender.prompt_of(s.history)) for s in mine]
        part = output / "parts" / f"rank_{runtime.rank}.jsonl"
        torn = part.is_file() and not part.read_bytes().endswith(b"\n") and part.stat().st_size > 0
        with open(part, "a", encoding="utf-8") as stream:
            if torn:
                stream.write("\n")
            finished = 0
            for batch in _batches(mine, lengths, options.batch_size):
                rows = scorer.score(batch)
                stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                stream.flush()
                finished += len(batch)
                progress(finished, len(mine))
                if runtime.stop_signal is not None:
                    raise KeyboardInterrupt
    runtime.barrier()
    if not runtime.is_main:
        return None, kept
    done = read_parts(output / "parts", required)
    absent = [s.sample_id for s in subject.samples if s.sample_id not in done]
    if absent:
        raise UserError(
            f"{len(absent)} samples have no predictions (a rank ended early), e.g. sample {absent[0]}",
            "start the same command again: it goes on where it ended",
        )
    rows = [done[s.sample_id] for s in subject.samples]
    path = output / "predictions.jsonl"
    temporary = path.with_suffix(".part")
    temporary.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    os.replace(temporary, path)
    return rows, kept


class Progress:
    """A live bar on a terminal, plain lines every 15 s in a log; rank 0 speaks for its own share."""

    def __init__(self, runtime, what: str):
        self.runtime, self.what, self.started, self.last, self.bar = runtime, what, time.time(), 0.0, None

    def __enter__(self) -> "Progress":
        from rich.console import Console

        if self.runtime.is_main and Console().is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            )
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=None)
        return self

    def __call__(self, finished: int, total: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=finished, total=total)
        elif self.runtime.is_main and (finished == total or time.time() - self.last > 15):
            self.last, spent = time.time(), time.time() - self.started
            left = spent / finished * (total - finished)
            ranks = f" on this rank of {self.runtime.world}" if self.runtime.world > 1 else ""
            print(
                f"{self.what}: {finished}/{total} users{ranks}, {finished / spent:.2f} users/s, {left:.0f} s left",
                flush=True,
            )

    def __exit__(self, *exc) -> None:
        if self.bar is not None:
            self.bar.stop()
