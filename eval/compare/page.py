"""compare.md and compare.html: what differs, for whom, what the predictions hang on, and all numbers."""

from __future__ import annotations

import math

from eval.compare import audits
from eval.compare.comparison import Comparisons
from eval.compare.figures import comparison_figures
from eval.compare.rows import cells
from eval.compare.slices import columns as slice_columns
from eval.compare.slices import slice_rows
from eval.report.page import Page, Section, Table
from eval.report.words import arrow, label, number
from eval.rows.inputs import RowInputs

EXPLANATION = (
    "Differences to {base} are over the same users, with a 95 % interval. For the primary family there is "
    "also the "
    "interval at Holm's level. The effect size is the difference / (standard error x square root of users); "
    "0.2 is "
    "small, 0.5 medium. Detectable is the smallest true difference that these users would show with 80 % "
    "power."
)


def build_page(found: Comparisons) -> Page:
    """The whole page, in reading order."""
    base = found.runs[0].label
    summary = [_sentence(found, run) for run in found.rows]
    sections = [Section("In short", summary, figures=comparison_figures(found))]
    if found.slices:
        sections.append(_slices(found))
    audit_rows = audits.audit_rows(found.runs)
    if audit_rows:
        table = Table(audits.columns(found.runs), audit_rows)
        sections.append(Section("What the predictions hang on", [audits.EXPLANATION], tables=[table]))
    sections += [_family_section(found, run) for run in found.rows]
    sections += [_other_metrics_section(found, run) for run in found.rows]
    sections.append(_side_by_side(found))
    sections.append(_conventions(found))
    warnings = [note for note in found.notes if note.startswith("not a result")]
    warning = f"{warnings[0].capitalize()}." if warnings else ""
    first = found.runs[0]
    facts = [
        ("Baseline", base),
        ("Samples", f"{first.inputs.num_samples:,}"),
        ("Users", f"{len(first.inputs.user_ids):,}"),
        ("Catalogue", "" if isinstance(first.inputs, RowInputs) else f"{first.inputs.num_items:,} items"),
        ("Scoring", _each(found, "scoring")),
        ("Training objective", _each(found, "objective")),
    ]
    subtitle = " · ".join(run.label for run in found.runs)
    return Page("Comparison", subtitle, warning, [fact for fact in facts if fact[1]], sections)


def _each(found: Comparisons, key: str) -> str:
    """A value of results.json: once if all runs share it, else for each run; empty if none has it."""
    values = {run.label: run.results.get(key) for run in found.runs}
    if len(set(values.values())) == 1:
        return str(next(iter(values.values())) or "")
    return ", ".join(f"{value} ({run})" for run, value in values.items() if value)


def _slices(found: Comparisons) -> Section:
    text = (
        "The same comparison inside each value of the samples' labels; not corrected for the number of rows."
    )
    table = Table(slice_columns(found.runs[0].label), slice_rows(found.slices))
    return Section("Who gains, who pays", [text], tables=[table])


def _family_section(found: Comparisons, run: str) -> Section:
    base = found.runs[0].label
    columns = ["metric", base, "run", "difference", "95 % interval", "Holm interval", "Holm p"]
    columns += ["effect size", "detectable", "verdict"]
    rows = []
    for metric in found.family:
        row = cells(found, run, metric)
        rows.append(
            [
                row.metric,
                row.baseline,
                row.value,
                row.difference,
                row.interval,
                row.holm_interval,
                row.holm_p,
                row.effect_size,
                row.detectable,
                row.verdict,
            ]
        )
    explanation = EXPLANATION.format(base=base)
    return Section(f"{run} against {base}", [explanation], tables=[Table(columns, rows)])


def _other_metrics_section(found: Comparisons, run: str) -> Section:
    base = found.runs[0].label
    columns = ["metric", base, "run", "difference", "95 % interval", "effect size", "verdict"]
    rows = []
    for metric, comparison in found.rows[run].items():
        if comparison.family:
            continue
        row = cells(found, run, metric)
        rows.append(
            [row.metric, row.baseline, row.value, row.difference, row.interval, row.effect_size, row.verdict]
        )
    text = "These differences describe the runs; they are not corrected for the number of metrics."
    title = f"All other metrics: {run} against {base}"
    return Section(title, [text], tables=[Table(columns, rows)], folded=True)


def _side_by_side(found: Comparisons) -> Section:
    rows = []
    for name, metric in found.metrics.items():
        values = [number(found.samples[run.label][name].value) for run in found.runs]
        rows.append([f"{label(name)} {arrow(metric.higher_is_better)}", *values])
    table = Table(["metric", *(run.label for run in found.runs)], rows)
    return Section("Side by side", ["All metrics of all runs."], tables=[table], folded=True)


def _conventions(found: Comparisons) -> Section:
    text = [f"Note: {note}." for note in found.notes]
    text.append(
        f"{found.num_bootstrap:,} paired bootstrap replicates over users. Means have percentile intervals, "
        "curved statistics centred ones. Formulas: docs/evaluation.md."
    )
    return Section("Conventions and notes", text)


def _sentence(found: Comparisons, run: str) -> str:
    """One run in one line: what is better, what is worse, and what the others' own verdicts are."""
    base = found.runs[0].label
    by_verdict: dict[str, list[str]] = {"better": [], "worse": []}
    for name in found.family:
        row = found.rows[run][name]
        text = label(name)
        if row.baseline and math.isfinite(row.difference):
            text += f" ({100 * row.difference / abs(row.baseline):+.0f} %)"
        by_verdict.setdefault(row.verdict, []).append(text)
    parts = []
    for word in ("better", "worse"):
        names = by_verdict.pop(word)
        if names:
            parts.append(f"{word} on {', '.join(names)}")
    if not parts and "differs" not in by_verdict:
        parts.append("no difference of the primary family is shown")
    parts += [f"{verdict} for {', '.join(names)}" for verdict, names in by_verdict.items()]
    return f"**{run}** against {base}: {'; '.join(parts)}."
