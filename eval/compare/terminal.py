"""The comparison for a terminal of 80 columns: primary family, slices, the audits' headline effects."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from eval.compare.audits import audit_rows
from eval.compare.comparison import Comparisons
from eval.compare.rows import cells
from eval.compare.slices import SHOWN
from eval.report.words import arrow, label, number

# Shown under the primary family; Holm's correction does not run over them.
BESIDE_FAMILY = ("nll_calibrated", "nll_worst_relevance_group", "nll_calibrated_worst_group")
COLOURS = {"better": "green", "worse": "red"}
SHORT_VERDICTS = {
    "interval spans zero": "spans 0",
    "interval spans zero after Holm's correction": "spans 0 (Holm)",
    "not shown after Holm's correction": "unclear (Holm)",
    "too few users to say": "few users",
    "no user alone changes it": "unclear",
}
NUMBERS = ("value", "difference", "95 % interval")
READABLE = 10
"""Characters below which a column of words is not narrowed."""


def terminal_tables(found: Comparisons) -> Group:
    """All tables of a comparison."""
    parts = [family_table(found)]
    if found.slices:
        parts.append(slice_table(found))
    audits = audit_rows(found.runs)
    if audits:
        lines = []
        for _, effect, *values in audits:
            lines.append([effect, "", ""])
            lines += [["", run.label, value] for run, value in zip(found.runs, values, strict=True)]
        parts.append(
            _table("audits, each run's own 95 % interval", ["effect", "run", "value [interval]"], lines)
        )
    return Group(*parts)


def family_table(found: Comparisons) -> RichTable:
    """One line per metric and run; the baseline's value stands in the first line of a metric."""
    beside = [name for name in BESIDE_FAMILY if name in found.metrics and name not in found.family]
    lines = []
    for metric in [*found.family, *beside]:
        lines += _metric_lines(found, metric, indent="")
    base = found.runs[0].label
    columns = ["metric", "run", "value", "difference", "95 % interval", "verdict"]
    return _table(f"against {base}, paired 95 % intervals", columns, lines)


def slice_table(found: Comparisons) -> RichTable:
    """The metrics of every slice under the slice's title."""
    lines = []
    for title, part in found.slices:
        num_users = len(part.runs[0].inputs.user_ids)
        lines.append([f"{title}: {num_users:,} users", "", "", "", "", ""])
        for metric in (name for name in SHOWN if name in part.metrics):
            lines += _metric_lines(part, metric, indent="  ")
    columns = ["samples, metric", "run", "value", "difference", "95 % interval", "verdict"]
    return _table("who gains, who pays", columns, lines)


def _metric_lines(found: Comparisons, metric: str, indent: str) -> list[list[str]]:
    base = found.runs[0].label
    title = f"{indent}{label(metric)} {arrow(found.metrics[metric].higher_is_better)}"
    lines = [[title, base, number(found.samples[base][metric].value), "", "", ""]]
    for run in found.rows:
        row = cells(found, run, metric)
        lines.append(["", run, row.value, row.difference, row.interval, row.verdict])
    return lines


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> RichTable:
    shown = RichTable(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", title=Text(title)
    )
    for place, column in enumerate(columns):
        # Metrics and names of runs wrap where they must; numbers stay whole.
        justify = "right" if column in NUMBERS else "left"
        wraps = place == 0 or column == "run"
        widest = max((len(line[place]) for line in lines), default=0)
        shown.add_column(
            Text(column),
            justify=justify,
            no_wrap=not wraps,
            overflow="fold",
            min_width=min(widest, READABLE) if wraps else None,
        )
    for line in lines:
        words = [_short(cell) for cell in line]
        shown.add_row(*[Text(word, style=COLOURS.get(word, "")) for word in words])
    return shown


def _short(verdict: str) -> str:
    """Verdicts in a few letters; the pages have the words. Other cells stay as they are."""
    return SHORT_VERDICTS.get(verdict, verdict.removesuffix(" (uncorrected)"))
