"""The comparison for a terminal of 80 columns: the primary family, the label groups, the audits' headline effects."""

from __future__ import annotations

from typing import Any, Callable, Sequence

from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from eval import compare_audits
from eval.compare_labels import SHOWN
from eval.report import content

BESIDE_FAMILY = (
    "nll_calibrated",
    "nll_worst_relevance_group",
)  # shown under the primary family, not part of its correction
COLOUR = {"better": "green", "worse": "red"}


def terminal_tables(found: Any, row: Callable) -> Group:
    """All terminal tables of a comparison; `row` is eval.compare's formatter of one metric."""
    parts = [family_table(found, row)]
    if found.by_label:
        parts.append(label_table(found, row))
    audits = compare_audits.audit_rows(found.runs)
    if audits:
        lines = []
        for _, effect, *values in audits:
            lines += [[effect, "", ""], *(["", run.label, value] for run, value in zip(found.runs, values))]
        parts.append(
            _table("audits, each run's own 95 % interval", ["effect", "run", "value [interval]"], lines)
        )
    return Group(*parts)


def family_table(found: Any, row: Callable) -> RichTable:
    """One line per metric and run; the baseline's value stands in the first line of a metric."""
    base, lines = found.runs[0].label, []
    for name in [*found.family, *(n for n in BESIDE_FAMILY if n in found.metrics and n not in found.family)]:
        lines.append(
            [
                f"{content.label(name)} {content.arrow(found.metrics[name].higher_is_better)}",
                base,
                content.number(found.samples[base][name].value),
                "",
                "",
                "",
            ]
        )
        lines += [
            ["", label, *row(name, rows[name], None)[2:5], rows[name].verdict]
            for label, rows in found.rows.items()
        ]
    return _table(
        f"against {base}, paired 95 % intervals",
        ["metric", "run", "value", "difference", "95 % interval", "verdict"],
        lines,
    )


def label_table(found: Any, row: Callable) -> RichTable:
    lines = []
    for where, part in found.by_label:
        base = part.runs[0].label
        lines.append([f"{where}: {len(part.runs[0].inputs.user_ids):,} users", "", "", "", "", ""])
        for name in (n for n in SHOWN if n in part.metrics):
            title = f"  {content.label(name)} {content.arrow(part.metrics[name].higher_is_better)}"
            lines.append([title, base, content.number(part.samples[base][name].value), "", "", ""])
            lines += [
                ["", label, *row(name, rows[name], None)[2:5], rows[name].verdict]
                for label, rows in part.rows.items()
            ]
    return _table(
        "who gains, who pays",
        ["samples, metric", "run", "value", "difference", "95 % interval", "verdict"],
        lines,
    )


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> RichTable:
    shown = RichTable(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", title=Text(title)
    )
    for place, column in enumerate(columns):  # only the first column wraps: numbers and names stay whole
        shown.add_column(
            Text(column),
            justify="right" if column in ("value", "difference", "95 % interval") else "left",
            no_wrap=place > 0,
        )
    for line in lines:
        shown.add_row(*[Text(_short(cell), style=COLOUR.get(_short(cell), "")) for cell in line])
    return shown


def _short(verdict: str) -> str:
    """Verdicts in a few letters; the pages have the words."""
    return {
        "interval spans zero": "spans 0",
        "interval spans zero after Holm's correction": "spans 0 (Holm)",
    }.get(verdict, verdict.removesuffix(" (uncorrected)"))
