"""Audits: where does a bias live? Each is one file with a question, a measurement, a control, a cost estimate and a figure.

    run_audits(["sensitivity", "language"], subject, runtime)  ->  {name: result}, what results.json keeps under "audits"
    python -m eval.run --run RUN_DIR --audit sensitivity,language        (or --audit all)
Definitions, controls and how to add one: docs/audits.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.audit import (
    amplification,
    cross_tuning,
    debiasing,
    dimensionality,
    information,
    language,
    position,
    pretraining,
    provider,
    selection,
    sensitivity,
    shift,
    titles,
)
from eval.audit.context import Audit, AuditContext, AuditOptions, Cost
from eval.audit.folders import load_evaluations
from gdrt_ds.errors import UserError

__all__ = ["AUDITS", "Audit", "AuditContext", "AuditOptions", "Cost", "run_audits", "choose", "finite"]

FEW = 10  # a bootstrap over fewer units covers less than it says

AUDITS: dict[str, Audit] = {
    module.AUDIT.name: module.AUDIT
    for module in (
        sensitivity,
        information,
        language,
        pretraining,
        titles,
        provider,
        position,
        selection,
        dimensionality,
        shift,
        amplification,
        cross_tuning,
        debiasing,
    )
}


def choose(names: Sequence[str]) -> tuple[list[str], bool]:
    """Checked names in the registry's order, and whether `all` was asked for.

    Raises:
        UserError: an unknown name (with the nearest one).
    """
    from gdrt_ds.data.readers.base import nearest

    names = [n.strip() for n in names if n.strip()]
    everything = "all" in names
    for name in names:
        if name != "all" and name not in AUDITS:
            raise UserError(f"--audit {name}: there is no such audit", nearest(name, [*AUDITS, "all"]))
    if not names:
        raise UserError("--audit names no audit", f"choose among {', '.join(AUDITS)}, or all")
    return [name for name in AUDITS if everything or name in names], everything


def run_audits(
    names: Sequence[str], subject, runtime=None, options: AuditOptions = AuditOptions()
) -> dict[str, dict[str, Any]]:
    """Runs audits on a subject (or on a ready AuditContext), prints each one's cost before it starts and its finding after.

    Args:
        names: of AUDITS, or "all": then those that cannot run here are left out with words.
        subject: eval.loading.Subject, or an AuditContext.
    Returns:
        {name: result}; every rank gets the same numbers.
    Raises:
        UserError: unknown name; an audit asked for by name that lacks something (runs, checkpoints).
    """
    chosen, everything = choose(names)
    context = subject if isinstance(subject, AuditContext) else AuditContext(subject, runtime, options)
    say = print if context.runtime.is_main else (lambda *args, **kwargs: None)
    if context.options.runs:
        load_evaluations(
            context.options.runs, 1
        )  # a folder that was never evaluated is said now, not after the first audits
    found: dict[str, dict[str, Any]] = {}
    for name in chosen:
        audit = AUDITS[name]
        lacking = audit.lacks(context)
        if lacking is not None:
            if name not in names:
                say(f"audit {name}: left out of `all`: {lacking[0]} ({lacking[1]})", flush=True)
                continue
            raise UserError(f"--audit {name}: {lacking[0]}", lacking[1])
        cost = context.describe_cost(audit.cost(context))
        say(f"audit {name}: {cost}", flush=True)
        started = time.time()
        found[name] = finite(audit.run(context))
        if found[name]["effect"]["n"] < FEW:
            found[name]["finding"] += (
                f" Only {found[name]['effect']['n']} units: intervals of so few are too narrow."
            )
        found[name]["cost"] = (
            f"{cost}; took {time.time() - started:.0f} s on {context.runtime.world} rank(s) of {context.runtime.device.type}"
        )
        say(f"  {found[name]['finding']}", flush=True)
    if not found:
        raise UserError("none of the audits can run here", "see the reasons above")
    return found


def finite(value: Any) -> Any:
    """NaN and infinity become None: results.json is strict JSON. Arrays become lists."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    return int(value) if isinstance(value, np.integer) else value
