"""From a subject to an evaluation folder: scores, metrics, floors, audits, report. `eval.run` is its command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Sequence

from eval.floors import FLOORS, floor_predictions
from eval.loading import Subject
from eval.metrics import evaluate, evaluate_targets
from eval.predictions import (
    OBJECTIVES,
    Progress,
    ScoringOptions,
    check_exactness,
    claim_output,
    item_order,
    predict,
    scoring_key,
)
from gdrt_ds.errors import UserError
from gdrt_ds.runtime import Runtime, detect_rank, single_process_runtime, start_runtime
from gdrt_ds.training.run_folder import git_hash, versions

# Ranks finish at different times and meet at a barrier: the longest share must fit.
TIMEOUT_S = 7 * 24 * 3600


def evaluation_runtime() -> Runtime:
    """One process needs no process group; under a launcher every rank joins one."""
    if detect_rank()["world"] > 1:
        return start_runtime(timeout_s=TIMEOUT_S)
    return single_process_runtime()


def default_output(subject: Subject, options: ScoringOptions) -> Path:
    """RUN/eval/SPLIT-MODE[-base][-limitN]; for other models ./eval-NAME-SPLIT-MODE."""
    parts = [subject.split, options.mode]
    if options.mode not in OBJECTIVES and options.objective != "renormalised":
        parts.append(options.objective)
    if subject.limit:
        parts.append(f"limit{subject.limit}")
    if subject.run is None:
        return Path("-".join(["eval", subject.name, *parts]).replace("/", "-"))
    return subject.run / "eval" / "-".join(parts + (["base"] if subject.recommender.adapter is None else []))


def run_evaluation(
    subject: Subject,
    options: ScoringOptions,
    runtime: Runtime,
    *,
    output: Path | None = None,
    overwrite: bool = False,
    floors: bool = True,
    num_bootstrap: int = 1000,
    audits: Sequence[str] = (),
    audit_options: Any = None,
) -> dict[str, Any] | None:
    """Scores, measures, audits and reports.

    Args:
        audits: names of eval.audit, or all; they run after the scores are safe on disk, with `audit_options` (AuditOptions). Others that an
            earlier call left in the same output stay.
    Returns:
        the content of results.json on rank 0, None elsewhere.
    """
    context, keep = None, frozenset()
    if audits:
        from eval.audit import AuditContext, AuditOptions, choose, run_audits

        choose(audits)  # a misspelt name is refused before hours of scoring
        context = AuditContext(subject, runtime, audit_options or AuditOptions())
        keep = context.wanted_scores() if options.mode == "renormalised" else keep
    output = output or default_output(subject, options)
    key, size = scoring_key(subject, options), len(subject.catalogue)
    if runtime.is_main:
        for line in subject.recommender.lines:
            print(line)
        if options.k > size:
            print(f"lists: the catalogue has {size} items, so lists end there (--k {options.k})")
        print(check_exactness(subject, options), flush=True)
        claim_output(output, key, overwrite)
    runtime.barrier()
    with Progress(runtime, f"{subject.name}: {options.mode}") as progress:
        predictions, scores = predict(subject, options, output, runtime, progress, keep)
    audited = {}
    if context is not None:
        context.remember(scores)
        audited = run_audits(audits, context)
    if predictions is None:
        return None
    results = measure(subject, options, predictions, floors=floors, num_bootstrap=num_bootstrap)
    kept = {name: audit for name, audit in earlier_audits(output, key).items() if name not in audited}
    if kept:
        print(f"audits of an earlier evaluation of the same predictions are kept: {', '.join(kept)}")
    results["audits"] = {**kept, **audited}
    write(output, results, predictions, subject)
    return results


def earlier_audits(output: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Audits in OUTPUT/results.json, if that was made from the same model, prompt, samples and mode; else none."""
    try:
        before = json.loads((output / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return before.get("audits") or {} if before.get("scoring") == key else {}


def measure(
    subject: Subject,
    options: ScoringOptions,
    predictions: list[dict[str, Any]],
    *,
    floors: bool = True,
    num_bootstrap: int = 1000,
) -> dict[str, Any]:
    """results.json: metrics and breakdowns of the model, the floors and the test targets themselves."""
    entries, counts = subject.catalogue.entries, subject.train_history_counts()
    results = evaluate(predictions, entries, history_item_counts=counts, num_bootstrap=num_bootstrap)
    notes = list(results.get("notes", []))
    num_nan = sum(1 for p in predictions if p.get("num_nan"))
    if num_nan:
        notes.append(
            f"{num_nan} of {len(predictions)} samples have NaN scores, which count as the worst rank"
        )
    if subject.limit:
        notes.append(f"--limit {subject.limit}: not a result")
    if options.mode == "best_first":
        full = sum(p["certified"] >= len(p["top_ids"]) for p in predictions)
        nodes = sum(p["nodes_expanded"] for p in predictions) / len(predictions)
        notes.append(
            f"best-first: {full} of {len(predictions)} lists certified exact; {nodes:.0f} of {subject.recommender.trie.num_nodes} trie "
            "nodes opened per user; a target outside its list has no rank and counts as the worst"
        )
        results["search"] = {
            "certified_share": full / len(predictions),
            "nodes_per_user": nodes,
            "trie_nodes": subject.recommender.trie.num_nodes,
        }
    if options.mode == "beam":
        notes.append(
            f"beam search with {options.beams} beams: approximate lists; a target outside its list has no rank and counts as the worst"
        )
    found: dict[str, Any] = {}
    if floors:
        order = item_order(subject)
        for floor in FLOORS:
            rows = floor_predictions(subject, floor, order, options.k)
            found[floor] = evaluate(
                rows, entries, history_item_counts=counts, num_bootstrap=num_bootstrap, breakdowns=False
            )["metrics"]
    found["targets"] = evaluate_targets(
        predictions, entries, history_item_counts=counts, num_bootstrap=num_bootstrap
    )
    config = subject.recommender.config
    return {
        **results,
        "notes": notes,
        "name": subject.name,
        "split": subject.split,
        "num_samples": len(predictions),
        "num_items": len(entries),
        "objective": options.objective,
        "mode": options.mode,
        "k": options.k,
        "limit": subject.limit,
        "dtype": str(subject.recommender.reader.mask_dtype).removeprefix("torch."),
        "floors": found,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "git_hash": git_hash(),
        "scoring": scoring_key(subject, options),
    }


def write(output: Path, results: dict[str, Any], predictions: list[dict[str, Any]], subject: Subject) -> None:
    """results.json, then report.md and report.html, then the table on the terminal; the parts go last.

    Raises:
        UserError: the folder cannot be written.
    """
    from rich.console import Console

    from eval.report import terminal_table, write_report

    try:
        temporary = output / "results.json.part"
        temporary.write_text(
            json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False), encoding="utf-8"
        )
        os.replace(temporary, output / "results.json")
        write_report(
            output,
            results,
            predictions,
            subject.catalogue.entries,
            run_folder=subject.run,
            history_item_counts=subject.train_history_counts(),
        )
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written ({error.strerror or error})",
            "free space; the predictions are kept and need no new scoring",
        ) from None
    Console().print(terminal_table(results))
    print(
        f"written: {output}/results.json, predictions.jsonl, report.md, report.html"
        + ("   (--limit: not a result)" if subject.limit else "")
    )
