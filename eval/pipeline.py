"""From a subject to an evaluation folder: scores, metrics, floors, audits, report. `eval.run` calls it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from eval.floors import AUTO, Choice, choose, fit_floors, floor_predictions, minus_floors
from eval.folders import FORMAT
from eval.loading import Subject
from eval.metrics import evaluate, evaluate_targets
from eval.output import default_folder, what_is_scored, with_earlier_audits, write_evaluation
from eval.predictions import (
    Exactness,
    Progress,
    ScoringOptions,
    check_exactness,
    claim_output,
    item_order,
    predict,
    scoring_key,
)
from eval.shared_losses import note_of_left_out, over_shared_losses
from gdrt_ds.errors import LostPeer, StorageError, UserError
from gdrt_ds.runtime import Runtime, detect_rank, single_process_runtime, start_runtime
from gdrt_ds.training.run_folder import git_hash, versions

# Ranks finish at different times and meet at a barrier: the longest share must fit.
TIMEOUT_S = 7 * 24 * 3600

_UNLIKE_FLOORS = (
    "scoring full: the NLL of the model is over all token sequences, that of the floors over the catalogue, "
    "so they are not compared; the calibrated NLL, where it is measured, is over the catalogue for both"
)


def evaluation_runtime() -> Runtime:
    """One process needs no process group; under a launcher every rank joins one."""
    if detect_rank()["world"] > 1:
        return start_runtime(timeout_s=TIMEOUT_S)
    return single_process_runtime()


def default_output(subject: Subject, options: ScoringOptions) -> Path:
    """RUN/eval/SPLIT-MODE[-SCORING][-limitN][-base]; ./eval-NAME-SPLIT-MODE for models trained elsewhere."""
    what = what_is_scored(subject.split, options.mode, options.scoring)
    is_base = subject.recommender.adapter is None
    return default_folder(subject.run, subject.name, what, limit=subject.limit, is_base=is_base)


def run_evaluation(
    subject: Subject,
    options: ScoringOptions,
    runtime: Runtime,
    *,
    output: Path | None = None,
    overwrite: bool = False,
    floors: str = AUTO,
    num_bootstrap: int = 1000,
    audits: Sequence[str] = (),
    audit_options: Any = None,
) -> dict[str, Any] | None:
    """Scores, measures, audits and reports.

    Args:
        output: the evaluation folder; by default `default_output`.
        overwrite: drop other predictions in it.
        floors: names of eval.floors with commas between them, `auto` or `none`; see `eval.floors.choose`.
        num_bootstrap: draws of users for the intervals.
        audits: names of eval.audit, or all. They run after the scores are safe on disk. Audits that an
            earlier call left in the same output stay.
        audit_options: `AuditOptions` of eval.audit.
    Returns:
        the content of results.json on rank 0, None elsewhere.
    Raises:
        UserError: an unknown audit or floor, an output that cannot be used, or a model that cannot be
            scored exactly. Where a named audit turns out to be impossible, after the results are written.
    """
    context = None
    keep: frozenset[int] = frozenset()
    chosen_floors = choose(floors, subject.corpus)  # a misspelt name is refused before hours of scoring
    if audits:
        from eval.audit import AuditContext, AuditOptions, check_audits

        context = AuditContext(subject, runtime, audit_options or AuditOptions())
        check_audits(audits, context)  # what cannot run is refused before hours of scoring
        if options.mode == "renormalised":
            keep = context.wanted_scores()
    output = output or default_output(subject, options)
    key = scoring_key(subject, options)
    exactness = None
    if runtime.is_main:
        exactness = _begin(subject, options, output, key, overwrite)
    runtime.barrier()
    with Progress(runtime, f"{subject.name}: {options.mode}") as progress:
        predictions, scores = predict(subject, options, output, runtime, progress, keep)
    results = None
    if predictions is not None:
        results = measure(
            subject, options, predictions, exactness, floors=chosen_floors, num_bootstrap=num_bootstrap
        )
    audited, finished, failed = {}, None, None
    if context is not None:
        from eval.audit import FinishedAudits

        if results is not None:
            _show_before_audits(results)
        context.remember(scores)
        finished = FinishedAudits(output, key, context.options, runtime)
        if overwrite:
            finished.drop()
        audited, failed = _run_audits(audits, context, finished)
    if predictions is not None and results is not None:
        results["audits"] = with_earlier_audits(output, key, audited)
        write(output, results, predictions, subject)
        if finished is not None:
            finished.drop()
    if failed is not None:
        runtime.barrier()  # a rank that ends earlier would end the one that writes
        raise failed
    return results


def _run_audits(
    names: Sequence[str], context: Any, finished: Any
) -> tuple[dict[str, dict[str, Any]], UserError | None]:
    """The audits that could run, and why one that was named could not.

    The metrics are measured by now, so that they are written before anything is refused.
    """
    from eval.audit import choose, run_audits

    try:
        return run_audits(names, context, finished=finished), None
    except (StorageError, LostPeer):  # a full disk or a dead rank: there is nothing to write, or nobody
        raise
    except UserError as error:
        chosen, _ = choose(names)
        return {name: finished.found[name] for name in chosen if name in finished.found}, error


def _show_before_audits(results: dict[str, Any]) -> None:
    """The table, for whoever waits: audits can take longer than all before them."""
    from eval.report import terminal_table

    Console().print(terminal_table(results))
    print("the audits follow; the files are written after the last one", flush=True)


def _begin(
    subject: Subject, options: ScoringOptions, output: Path, key: dict[str, Any], overwrite: bool
) -> Exactness:
    """Says what is evaluated, checks that it can be scored, and makes the output ready."""
    for line in subject.recommender.lines:
        print(line)
    if subject.precision is not None:
        print(subject.precision.line())
    num_items = len(subject.catalogue)
    if options.k > num_items:
        print(f"lists: the catalogue has {num_items} items, so lists end there (--k {options.k})")
    exactness = check_exactness(subject, options)
    print(exactness.line(), flush=True)
    claim_output(output, key, overwrite)
    return exactness


def measure(
    subject: Subject,
    options: ScoringOptions,
    predictions: list[dict[str, Any]],
    exactness: Exactness | None = None,
    *,
    floors: Choice,
    num_bootstrap: int = 1000,
) -> dict[str, Any]:
    """The content of results.json: metrics and slices of the model, the floors, the test targets."""
    entries = subject.catalogue.entries
    counts = subject.train_history_counts()
    results = evaluate(predictions, entries, history_item_counts=counts, num_bootstrap=num_bootstrap)
    found: dict[str, Any] = {}
    fitted, floor_notes = fit_floors(subject, floors)
    order = item_order(subject)
    floor_rows: dict[str, list[dict[str, Any]]] = {}
    for name, floor in fitted.items():
        rows = floor_rows[name] = floor_predictions(subject, floor, order, options.k)
        found[name] = evaluate(
            rows, entries, history_item_counts=counts, num_bootstrap=num_bootstrap, breakdowns=False
        )["metrics"]
    found["targets"] = evaluate_targets(
        predictions, entries, history_item_counts=counts, num_bootstrap=num_bootstrap
    )
    notes = _notes(subject, options, predictions) + floor_notes
    over_catalogue = options.scoring == "renormalised"
    if floor_rows and not over_catalogue:
        notes.append(_UNLIKE_FLOORS)
    _, num_left_out = over_shared_losses([predictions, *floor_rows.values()])
    if floor_rows and num_left_out:
        compared = f"the model, {', '.join(floor_rows)}"
        notes.append(note_of_left_out(num_left_out, len(predictions), compared))
    if exactness is not None:
        results["exactness"] = exactness.figures()
        notes += exactness.notes()
    if subject.precision is not None:
        results["precision"] = subject.precision.figures()
        notes.append(subject.precision.line())
    if options.mode == "best_first":
        results["search"] = _search_figures(subject, predictions)
    return {
        **results,
        "format": FORMAT,
        "notes": [*results.get("notes", []), *notes],
        "name": subject.name,
        "split": subject.split,
        "num_samples": len(predictions),
        "num_items": len(entries),
        "objective": subject.objective,
        "scoring": options.scoring,
        "mode": options.mode,
        "k": options.k,
        "limit": subject.limit,
        "dtype": str(subject.recommender.reader.mask_dtype).removeprefix("torch."),
        "floors": found,
        "minus_floors": minus_floors(
            predictions, floor_rows, entries, num_bootstrap, over_catalogue=over_catalogue
        ),
        "config": subject.recommender.config.model_dump(mode="json"),
        "versions": versions(),
        "git_hash": git_hash(),
        "scoring_key": scoring_key(subject, options),
    }


def _search_figures(subject: Subject, predictions: list[dict[str, Any]]) -> dict[str, float]:
    """How far best-first searches got: share of lists proven exact, and trie nodes opened per user."""
    certified = sum(row["certified"] >= len(row["top_ids"]) for row in predictions)
    return {
        "certified_share": certified / len(predictions),
        "nodes_per_user": sum(row["nodes_expanded"] for row in predictions) / len(predictions),
        "trie_nodes": subject.recommender.trie.num_nodes,
    }


def _notes(subject: Subject, options: ScoringOptions, predictions: list[dict[str, Any]]) -> list[str]:
    """What a reader of the numbers has to know."""
    notes = []
    num_nan = sum(1 for row in predictions if row.get("num_nan"))
    if num_nan:
        notes.append(
            f"{num_nan} of {len(predictions)} samples have NaN scores, which count as the worst rank"
        )
    if subject.limit:
        notes.append(f"--limit {subject.limit}: not a result")
    no_rank = "a target outside its list has no rank and counts as the worst"
    if options.mode == "best_first":
        search = _search_figures(subject, predictions)
        certified = round(search["certified_share"] * len(predictions))
        notes.append(
            f"best-first: {certified} of {len(predictions)} lists certified exact; "
            f"{search['nodes_per_user']:.0f} of {search['trie_nodes']} trie nodes opened per user; {no_rank}"
        )
        unproven = sum(
            row["rank"] is None and row["target_id"] in row["top_ids"][row["certified"] :]
            for row in predictions
        )
        if unproven:
            notes.append(
                f"best-first: {unproven} targets stand in the unproven part of their lists and count as "
                "misses, so HR and NDCG are lower bounds; raise --max-nodes"
            )
    if options.mode == "beam":
        notes.append(f"beam search with {options.beams} beams: approximate lists; {no_rank}")
    return notes


def write(output: Path, results: dict[str, Any], predictions: list[dict[str, Any]], subject: Subject) -> None:
    """Writes results.json and the reports, and prints the table."""
    from eval.report import terminal_table, trained_in, write_report

    def write_reports() -> None:
        write_report(
            output,
            results,
            predictions,
            subject.catalogue.entries,
            run_folder=trained_in(subject.run, subject.recommender.adapter),
            history_item_counts=subject.train_history_counts(),
        )

    write_evaluation(output, results, write_reports, terminal_table(results))
