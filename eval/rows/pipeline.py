"""From a subject of rows to an evaluation folder: scores, metrics, floors, audit, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.audit.options import DEFAULT_OPTIONS, AuditOptions
from eval.output import default_folder, what_is_scored, with_earlier_audits, write_evaluation
from eval.predictions import Progress, claim_output
from eval.report import trained_in
from eval.rows import sensitivity
from eval.rows.measure import measure
from eval.rows.predict import predict, scoring_key
from eval.rows.report import terminal_table, write_report
from eval.rows.subject import RowSubject
from gdrt_ds.errors import UserError
from gdrt_ds.runtime import Runtime


def check_mode(mode: str) -> None:
    """Raises UserError for ways of scoring that search a catalogue."""
    if mode not in ("renormalised", "full"):
        raise UserError(
            f"--mode {mode}: it searches a catalogue, and rows of prompt and completion have none",
            "leave --mode away: completions and listed answers are scored exactly over the vocabulary",
        )


def wants_floors(given: str) -> bool:
    """Whether `--floors` asks for the floors of listed answers.

    Raises:
        UserError: floors that rank a catalogue.
    """
    if given == "none":
        return False
    if given != "auto" and not set(given.split(",")) <= {"majority", "chance"}:
        raise UserError(
            f"--floors {given}: rows of prompt and completion have the floors majority and chance",
            "leave --floors away, or give --floors none",
        )
    return True


def default_output(subject: RowSubject) -> Path:
    """RUN/eval/SPLIT-full[-limitN][-base]; ./eval-NAME-SPLIT-full for models trained elsewhere."""
    is_base = subject.model.adapter is None
    what = what_is_scored(subject.split, "full", "full", on_rows=True)
    return default_folder(subject.run, subject.name, what, limit=subject.limit, is_base=is_base)


def evaluate_rows(
    subject: RowSubject,
    runtime: Runtime,
    *,
    output: Path | None = None,
    overwrite: bool = False,
    floors: bool = True,
    num_bootstrap: int = 1000,
    batch_size: int = 8,
    audits: Sequence[str] = (),
    audit_options: AuditOptions = DEFAULT_OPTIONS,
) -> dict[str, Any] | None:
    """Scores, measures, audits and reports; arguments as those of `eval.pipeline.run_evaluation`.

    Returns:
        the content of results.json on rank 0, None elsewhere.

    Raises:
        UserError: an audit about catalogues, or an output that cannot be used.
    """
    names = [name.strip() for name in audits if name.strip()]
    audited = sensitivity.choose(names)
    output = output or default_output(subject)
    key = scoring_key(subject)

    def say(line: str) -> None:
        if runtime.is_main:
            print(line, flush=True)

    if audited:
        audited = sensitivity.can_run(subject, names, say)
    for line in subject.model.lines:
        say(line)
    if runtime.is_main:
        claim_output(output, key, overwrite)
    runtime.barrier()
    with Progress(runtime, subject.name, "rows") as progress:
        predictions = predict(subject, output, runtime, progress, batch_size)
    found = {}
    if audited:
        found[sensitivity.NAME] = sensitivity.run(subject, runtime, audit_options, say)
    if predictions is None:
        return None
    results = measure(subject, predictions, floors=floors, num_bootstrap=num_bootstrap)
    results["audits"] = with_earlier_audits(output, key, found)
    run = trained_in(subject.run, subject.model.adapter)
    write_evaluation(output, results, lambda: write_report(output, results, run), terminal_table(results))
    return results
