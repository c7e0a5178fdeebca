"""What an audit is: its definition, what it costs and the form of its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate
from eval.audit.options import AuditOptions
from gdrt_ds.errors import UserError

Result = dict[str, Any]
Lack = tuple[str, str] | None
"""What an audit lacks: (problem, fix) in words, or None if it can run."""


@dataclass(frozen=True)
class Cost:
    """Model passes that an audit is going to make.

    Attributes:
        scorings: exact scorings of the whole catalogue behind one prompt.
        losses: passes over a prompt and its target.
        tokens: tokens of passes that have no history.
        note: in words, what else it does.
    """

    scorings: int = 0
    losses: int = 0
    tokens: int = 0
    note: str = ""


def can_run(context: AuditContext) -> Lack:
    """For `Audit.lacks` of an audit that runs on every model."""
    return None


@dataclass(frozen=True)
class Audit:
    """One audit. Its name is that of the file that binds it to `AUDIT`.

    Attributes:
        title, question: head of its section in the report.
        run: does it all and returns `result(...)`.
        cost: what `run` is going to cost; it is printed before `run` starts.
        order: place in the report and in the order of running; audits of one order are sorted by name.
            Audits of the prompt come first, because they are cheap and their scores serve the others. Then
            come audits of the lists, of the logs and of training, and at last those over several runs.
        lacks: None if the audit can run here, else what is missing.
        compare: for an audit over several runs, the same without a model: (folders, options) ->
            `result(...)`.
    """

    title: str
    question: str
    run: Callable[[AuditContext], Result]
    cost: Callable[[AuditContext], Cost]
    order: int = 50
    lacks: Callable[[AuditContext], Lack] = can_run
    compare: Callable[[Sequence[str], AuditOptions], Result] | None = None

    def headed(self, found: Result) -> Result:
        """A result with this audit's title and question at its head."""
        return {"title": self.title, "question": self.question, **found}


def matrix_cost(default_users: int) -> Callable[[AuditContext], Cost]:
    """`Audit.cost` of an audit that reads the user x item score matrix and nothing else of the model."""

    def cost(context: AuditContext) -> Cost:
        return Cost(scorings=context.unscored(default_users))

    return cost


def audit_over_runs(
    title: str,
    question: str,
    compare: Callable[[Sequence[str], AuditOptions], Result],
    check: Callable[[Sequence[str]], object],
    at_least: int,
    order: int,
) -> Audit:
    """An audit that reads evaluation folders (`--runs`) and makes no model passes.

    Args:
        compare: (folders, options) -> `result(...)`.
        check: raises UserError where these folders cannot be compared. It reads results alone, so that they
            are refused before anything is scored.
        at_least: folders that it needs.
    """

    def run(context: AuditContext) -> Result:
        return compare(context.options.runs, context.options)

    def cost(context: AuditContext) -> Cost:
        return Cost(note=f"reads {len(context.options.runs)} evaluation folders")

    def lacks(context: AuditContext) -> Lack:
        given = len(context.options.runs)
        if given < at_least:
            return (
                f"it compares at least {at_least} runs, --runs names {given}",
                "give --runs DIR DIR ... of evaluated runs",
            )
        try:
            check(context.options.runs)
        except UserError as error:
            return error.problem, error.fix
        return None

    return Audit(title, question, run, cost, order, lacks, compare)


def result(
    *,
    finding: str,
    control: str,
    effect: Estimate,
    effect_name: str,
    speaks: bool,
    measures: dict[str, Estimate],
    table: dict[str, Any] | None = None,
    figures: Sequence[dict[str, Any]] = (),
    better: str | None = "null",
    **extra: Any,
) -> Result:
    """The dictionary of one finished audit, as it stands in results.json (schema: eval.report).

    Args:
        finding: one sentence with an interval.
        control: what the control shows, in which the effect must vanish.
        effect, effect_name: the one number that stands for the audit.
        speaks: whether the audit found something.
        measures: all its estimates by name.
        better: which way the effect improves: `null` (towards its null value), `higher`, `lower`, None =
            neither.
        extra: further keys of this audit alone.
    """
    return {
        "finding": finding,
        "table": table,
        "figures": list(figures),
        "control": control,
        "effect": {"name": effect_name, "better": better, **effect.as_dict()},
        "speaks": bool(speaks),
        "measures": {name: estimate.as_dict() for name, estimate in measures.items()},
        **extra,
    }


def estimate_series(name: str, estimates: Sequence[Estimate]) -> dict[str, Any]:
    """One series of a bar chart with whiskers."""
    return {
        "name": name,
        "values": [e.value for e in estimates],
        "low": [e.low for e in estimates],
        "high": [e.high for e in estimates],
    }


def estimate_table(estimates: dict[str, Estimate], first_column: str = "measure") -> dict[str, Any]:
    """A table with one row per estimate."""
    return {
        "columns": [first_column, "value", "low", "high"],
        "rows": [[name, e.value, e.low, e.high] for name, e in estimates.items()],
    }
