"""The folder that an evaluation writes: where it lies, which audits stay in it, and how results get there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.folders import RESULTS, is_evaluation, read_results
from eval.modes import SEARCHES, scoring_of
from gdrt_ds.errors import UserError
from gdrt_ds.files import write_json


def what_is_scored(split: str, mode: str, scoring: str | None, *, on_rows: bool = False) -> list[str]:
    """The parts of an evaluation folder's name that tell evaluations of one run apart.

    Args:
        scoring: the value of `--scoring`; None where it is left out.
        on_rows: the run is on rows of prompt and completion (`data.format=sft`), which have one mode.
    Raises:
        UserError: the scoring contradicts the mode.
    """
    scoring = scoring_of(mode, scoring)
    if on_rows:
        return [split, "full"]
    if mode in SEARCHES and scoring != "renormalised":
        return [split, mode, scoring]
    return [split, mode]


def default_folder(run: Path | None, name: str, what: list[str], *, limit: int | None, is_base: bool) -> Path:
    """RUN/eval/WHAT[-limitN][-base]; ./eval-NAME-WHAT[-limitN] for models trained elsewhere.

    Args:
        what: from `what_is_scored`.
    """
    parts = list(what)
    if limit:
        parts.append(f"limit{limit}")
    if run is None:
        return Path("-".join(["eval", name, *parts]).replace("/", "-"))
    if is_base:
        parts.append("base")
    return run / "eval" / "-".join(parts)


def earlier_audits(output: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Audits in OUTPUT/results.json, if it is of the same predictions; else none.

    Args:
        key: what predictions depend on, from `scoring_key`.
    """
    if not is_evaluation(output):
        return {}
    try:
        before = read_results(output)
    except UserError:  # damaged: this evaluation writes it anew
        return {}
    if before.get("scoring_key") != key:
        return {}
    return before.get("audits") or {}


def with_earlier_audits(output: Path, key: dict[str, Any], audited: dict[str, Any]) -> dict[str, Any]:
    """The audits of this evaluation and those that an earlier one left; one line says which stay."""
    kept = {name: audit for name, audit in earlier_audits(output, key).items() if name not in audited}
    if kept:
        print(f"audits of an earlier evaluation of the same predictions are kept: {', '.join(kept)}")
    return {**kept, **audited}


def write_evaluation(
    output: Path, results: dict[str, Any], write_reports: Callable[[], None], table: Table
) -> None:
    """Writes results.json, then the reports, and prints the table.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        write_json(output / RESULTS, results)
        write_reports()
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot be written ({error.strerror or error})",
            "free space; the predictions are kept and need no new scoring",
        ) from None
    Console().print(table)
    warning = "   (--limit: not a result)" if results.get("limit") else ""
    print(f"written: {output}/results.json, predictions.jsonl, report.md, report.html{warning}", flush=True)
