"""Audits: where does a bias live? Each has a question, a measurement, a control, a cost and a figure.

    run_audits(["sensitivity", "language"], subject, runtime)     # {name: result}: "audits" in results.json
    python -m eval.run --run RUN_DIR --audit sensitivity,language        (or --audit all)
    python -m eval.audit cross_tuning DIR DIR ...                 # over evaluated runs, without a model

An audit is one file: in model/ if it needs a model, in runs/ if it reads evaluation folders. What they share
stands beside them. Definitions, controls and how to add one: docs/audits.md.
"""

from eval.audit.base import Audit, Cost
from eval.audit.context import AuditContext
from eval.audit.finished import FinishedAudits
from eval.audit.options import AuditOptions
from eval.audit.running import audits, check_audits, choose, run_audits

__all__ = [
    "Audit",
    "AuditContext",
    "AuditOptions",
    "Cost",
    "FinishedAudits",
    "audits",
    "check_audits",
    "choose",
    "run_audits",
]
