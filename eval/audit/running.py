"""Finds the audits, checks the names that a user asks for, and runs them one after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from eval.audit.base import Audit, Lack
from eval.audit.context import AuditContext, TooFewUsers
from eval.audit.costs import CostEstimate
from eval.audit.finished import FinishedAudits
from eval.audit.options import DEFAULT_OPTIONS, AuditOptions
from eval.folders import load_evaluations, unlike
from gdrt_ds.errors import LostPeer, StorageError, UserError, nearest
from gdrt_ds.files import finite
from gdrt_ds.registry import parts

OF_MODEL = "eval.audit.model"  # a new audit is one file in one of these two rooms
OVER_RUNS = "eval.audit.runs"
ALL = "all"
FEW = 10  # fewer units show little, and a resample of them is rough


def audits() -> dict[str, Audit]:
    """All audits by name, in the order of running and of the report (see `Audit.order`)."""
    found = {**parts(OF_MODEL, "AUDIT"), **parts(OVER_RUNS, "AUDIT")}
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


def choose(names: Sequence[str]) -> tuple[list[str], bool]:
    """Checked names in the order of running, and whether `all` was asked for.

    Raises:
        UserError: an unknown name (with the nearest one), or none.
    """
    known = list(audits())
    names = [name.strip() for name in names if name.strip()]
    everything = ALL in names
    for name in names:
        if name != ALL and name not in known:
            raise UserError(f"--audit {name}: there is no such audit", nearest(name, [*known, ALL]))
    if not names:
        raise UserError("--audit names no audit", f"choose among {', '.join(known)}, or all")
    return [name for name in known if everything or name in names], everything


def run_audits(
    names: Sequence[str],
    subject,
    runtime=None,
    options: AuditOptions = DEFAULT_OPTIONS,
    finished: FinishedAudits | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs audits on a subject; prints each one's cost before it starts and its finding after.

    Args:
        names: names of audits, or "all": then those that cannot run here are left out, and a line says why.
        subject: eval.loading.Subject, or a ready AuditContext.
        finished: where finished audits are written down; those of an interrupted evaluation are not repeated.
    Returns:
        {name: result}; every rank gets the same numbers. Empty where `all` leaves every audit out.
    Raises:
        UserError: unknown name; an audit asked for by name that lacks something (runs, checkpoints).
    """
    chosen, _ = choose(names)
    context = subject if isinstance(subject, AuditContext) else AuditContext(subject, runtime, options)
    check_audits(names, context)
    estimate = CostEstimate(context)
    found: dict[str, dict[str, Any]] = {}
    before = {} if finished is None else dict(finished.found)
    for name in chosen:
        if name in before:
            found[name] = before[name]
            _say(context, f"audit {name}: finished before the interruption, and kept")
            continue
        audit = audits()[name]
        lacking = _lack_of(audit, context)
        if lacking is None:
            try:
                result = _run_one(name, audit, context, estimate)
            except (StorageError, LostPeer):  # they are no matter of this audit
                raise
            except UserError as error:  # its cost and what it lacks did not tell
                lacking = (error.problem, error.fix)
            else:
                found[name] = result
                if finished is not None:
                    finished.add(name, result)
                continue
        _leave_out(name, names, lacking, context)
    if not found:
        _say(context, "no audit can run here; see the reasons above")
    return found


def _leave_out(name: str, names: Sequence[str], lacking: tuple[str, str], context: AuditContext) -> None:
    """Says why `all` leaves an audit out.

    Raises:
        UserError: the audit was asked for by name.
    """
    problem, fix = lacking
    if name in names:
        raise UserError(f"--audit {name}: {problem}", fix)
    _say(context, f"audit {name}: left out of `all`: {problem} ({fix})")


def check_audits(names: Sequence[str], context: AuditContext) -> None:
    """Refuses what cannot run, before hours of scoring and before the first audit.

    Raises:
        UserError: an unknown name, a folder of `--runs` that was never evaluated, folders of `--runs` of
            different splits, or an audit asked for by name that lacks something.
    """
    chosen, _ = choose(names)
    if context.options.runs:
        for note in unlike(load_evaluations(context.options.runs, 1)):
            _say(context, f"--runs: {note}")
    for name in chosen:
        if name in names:
            lacking = _lack_of(audits()[name], context)
            if lacking is not None:
                _leave_out(name, names, lacking, context)


def _lack_of(audit: Audit, context: AuditContext) -> Lack:
    """What an audit lacks, its users included; None if it can run."""
    lacking = audit.lacks(context)
    if lacking is None:
        try:
            audit.cost(context)  # it counts the users that the audit is going to look at
        except TooFewUsers as error:
            return error.problem, error.fix
    return lacking


def _run_one(name: str, audit: Audit, context: AuditContext, estimate: CostEstimate) -> dict[str, Any]:
    """One audit's result, with a warning about few units and with what it cost."""
    cost = estimate.describe(audit.cost(context))
    _say(context, f"audit {name}: {cost}")
    started = time.time()
    found = finite(audit.headed(audit.run(context)))
    units = found["effect"]["n"]
    if units < FEW:
        found["finding"] += f" Only {units} units: so few show large effects alone, and roughly."
    seconds = time.time() - started
    runtime = context.runtime
    found["cost"] = f"{cost}; took {seconds:.0f} s on {runtime.world} rank(s) of {runtime.device.type}"
    _say(context, f"  {found['finding']}")
    return found


def _say(context: AuditContext, line: str) -> None:
    """Prints a line on rank 0."""
    if context.runtime.is_main:
        print(line, flush=True)
