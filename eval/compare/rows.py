"""One difference as the cells of a table, the same on the page and on the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from eval.compare.comparison import Comparisons
from eval.intervals import Comparison
from eval.report.words import arrow, label, number, signed


@dataclass(frozen=True)
class Cells:
    """A comparison of one metric as text."""

    metric: str
    baseline: str
    value: str
    difference: str
    interval: str
    holm_interval: str
    holm_p: str
    effect_size: str
    detectable: str
    verdict: str


def cells(found: Comparisons, run: str, metric: str) -> Cells:
    """The cells of one metric of the run with the label `run`; undefined numbers are dashes."""
    row = found.rows[run][metric]
    return Cells(
        metric=f"{label(metric)} {arrow(found.metrics[metric].higher_is_better)}",
        baseline=number(row.baseline),
        value=number(row.value),
        difference=signed(row.difference),
        interval=_between(row.ci_low, row.ci_high),
        holm_interval=_holm_interval(row),
        holm_p=number(row.p_holm),
        effect_size=number(row.effect_size),
        detectable=number(row.minimum_detectable),
        verdict=row.verdict,
    )


def _holm_interval(row: Comparison) -> str:
    return "–" if row.ci_holm is None else _between(*row.ci_holm)


def _between(low: float, high: float) -> str:
    return f"{signed(low)} to {signed(high)}"
