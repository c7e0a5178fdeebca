"""Compare evaluations on the same users: `python -m eval.compare DIR DIR ... [--baseline DIR] [--output DIR]`.

Every DIR is an evaluation folder (results.json, predictions.jsonl, catalogue.jsonl). Differences are paired: the same
bootstrap draws of users go through all runs. Holm's correction runs over the primary family (NDCG@10, HR@10, MRR, NLL, MGU@5,
DGU@5, CVaR of NLL). Writes compare.md, compare.html and compare.json; the table goes to the terminal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Mapping, Sequence

from rich.console import Console

from eval import compare_audits
from eval.compare_labels import columns as label_columns
from eval.compare_labels import compare_by_label, label_rows
from eval.compare_terminal import terminal_tables
from eval.intervals import Comparison, Resampled, compare_family, resample
from eval.metrics import DEFAULT_KS, figure, table
from eval.metrics.inputs import Inputs, build_inputs
from eval.report import content
from eval.report.html import render_html
from eval.report.markdown import render_markdown
from gdrt_ds.errors import UserError

EFFECT_SHOWN = 2.0  # the effect-size figure is cut here: one huge effect must not flatten the others


@dataclass
class Run:
    """One evaluation folder, read."""

    label: str
    folder: Path
    results: Mapping[str, Any]
    predictions: list[dict[str, Any]]
    entries: list[Any]
    history_counts: dict[str, float] | None
    inputs: Inputs


@dataclass
class Comparisons:
    """runs[0] is the baseline; rows[label][metric] compares a run with it."""

    runs: list[Run]
    samples: dict[str, dict[str, Resampled]]
    rows: dict[str, dict[str, Comparison]]
    metrics: dict[str, table.Metric]
    family: list[str]
    num_bootstrap: int
    notes: list[str]
    by_label: list[tuple[str, "Comparisons"]] = field(default_factory=list)


def load_run(folder: str | Path, label: str) -> Run:
    """Read an evaluation folder; raises UserError naming the file that is missing or unreadable."""
    folder = Path(folder)
    results = json.loads(_text(folder / "results.json"))
    predictions = _json_lines(folder / "predictions.jsonl")
    rows = _json_lines(folder / "catalogue.jsonl")
    entries = [
        SimpleNamespace(
            item_id=r["item_id"],
            merged_ids=r.get("merged_ids") or [],
            text=r.get("text", ""),
            train_count=r["train_count"],
            provider=r.get("provider"),
            groups=r.get("groups") or {},
        )
        for r in rows
    ]
    counts = (
        {r["item_id"]: r["history_count"] for r in rows} if all("history_count" in r for r in rows) else None
    )
    predictions.sort(
        key=lambda p: str(p["sample_id"])
    )  # the order of the file must not pair the wrong samples
    return Run(
        label, folder, results, predictions, entries, counts, build_inputs(predictions, entries, counts)
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror})", "give folders that `python -m eval.run` has written"
        ) from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number} is not JSON ({error.msg})",
                "run the evaluation again; the file is damaged",
            ) from error
    return rows


def labels_of(folders: Sequence[str | Path]) -> list[str]:
    """The shortest path endings that tell the folders apart: runs/a/eval, runs/b/eval -> a, b."""
    parts = [Path(os.path.abspath(f)).parts for f in folders]
    if len(set(parts)) != len(parts):
        raise UserError("a folder is given twice", "give each evaluation folder once")
    depth = next(d for d in range(1, max(map(len, parts)) + 1) if len({p[-d:] for p in parts}) == len(parts))
    endings = [p[-depth:] for p in parts]
    while depth > 1 and len({e[-1] for e in endings}) == 1 and len({e[:-1] for e in endings}) == len(endings):
        endings, depth = [e[:-1] for e in endings], depth - 1  # a shared last name says nothing
    return _without_shared_words(["/".join(e) for e in endings])


def _without_shared_words(names: list[str]) -> list[str]:
    """run-sft-eval, run-gdrt-eval -> sft, gdrt: words that all names begin or end with are left out while names stay distinct and not empty."""
    words = [name.split("-") for name in names]
    for cut, edge in ((slice(None, -1), -1), (slice(1, None), 0)):
        while min(map(len, words)) > 1 and len({w[edge] for w in words}) == 1:
            words = [w[cut] for w in words]
    return ["-".join(w) for w in words]


def check_same(runs: Sequence[Run]) -> list[str]:
    """Refuse runs over other users, targets or catalogues; return notes on what differs but may be compared."""
    first, notes = runs[0], []
    for run in runs[1:]:
        pair = f"{first.label} and {run.label}"
        ours, theirs = set(first.inputs.item_ids), set(run.inputs.item_ids)
        if ours != theirs:
            raise UserError(
                f"{pair} have different catalogues ({len(ours)} and {len(theirs)} items, {len(ours & theirs)} shared)",
                "evaluate both on the same data; ranks among different items cannot be compared",
            )
        keys = [
            {(str(p["sample_id"]), str(p["user_id"]), p["target_id"]) for p in r.predictions}
            for r in (first, run)
        ]
        if keys[0] != keys[1]:
            shared = len(keys[0] & keys[1])
            raise UserError(
                f"{pair} have different test samples ({len(keys[0])} and {len(keys[1])}, {shared} with the same user and target)",
                "evaluate both with the same split, --limit and data; a paired comparison needs the same users",
            )
        if dict(zip(first.inputs.item_ids, first.inputs.train_count)) != dict(
            zip(run.inputs.item_ids, run.inputs.train_count)
        ):
            raise UserError(
                f"{pair} have different train counts in their catalogues",
                "evaluate both with the same training split",
            )
        for key in ("objective", "mode", "dtype"):
            if first.results.get(key) != run.results.get(key):
                notes.append(
                    f"{key} differs: {first.label} {first.results.get(key)}, {run.label} {run.results.get(key)}"
                )
    limits = sorted({str(r.results["limit"]) for r in runs if r.results.get("limit")})
    if limits:
        notes.insert(0, f"not a result: limited to {', '.join(limits)} samples")
    return notes


def compare_runs(runs: Sequence[Run], num_bootstrap: int = 2000, seed: int = 0) -> Comparisons:
    """Paired comparison of every run with the first."""
    if len(runs) < 2:
        raise UserError("one folder is nothing to compare", "give at least two evaluation folders")
    notes = check_same(runs)
    samples, metrics = {}, {}
    for run in runs:
        found, rows, _ = table.statistics(run.inputs, DEFAULT_KS)
        samples[run.label] = resample(found, run.inputs.user_of_sample, num_bootstrap, seed)
        metrics.update(rows)
    names = [name for name in metrics if all(name in s for s in samples.values())]
    missing = sorted(set(metrics) - set(names))
    if missing:
        notes.append(f"left out, because not every run has them: {', '.join(missing)}")
    order = [m.name_at(k) for m in table.METRICS for k in m.cut_offs(DEFAULT_KS)]
    names.sort(key=order.index)
    family = [n for n in names if metrics[n].is_primary(int(n.split("@")[1]) if "@" in n else None)]
    directions = {n: metrics[n].higher_is_better for n in names}
    num_users = len(runs[0].inputs.user_ids)
    kept = {label: {n: s[n] for n in names} for label, s in samples.items()}
    compared = {
        run.label: compare_family(kept[runs[0].label], kept[run.label], num_users, family, directions)
        for run in runs[1:]
    }
    return Comparisons(
        list(runs), kept, compared, {n: metrics[n] for n in names}, family, num_bootstrap, notes
    )


def to_json(found: Comparisons) -> dict[str, Any]:
    runs = {
        run.label: {
            "folder": run.folder.name,
            "metrics": {
                n: figure(s, found.metrics[n].higher_is_better) for n, s in found.samples[run.label].items()
            },
        }
        for run in found.runs
    }
    clean = lambda v: None if isinstance(v, float) and v != v else v
    rows = {
        label: {n: {k: clean(v) for k, v in asdict(row).items()} for n, row in rows.items()}
        for label, rows in found.rows.items()
    }
    return {
        "baseline": found.runs[0].label,
        "runs": runs,
        "comparisons": rows,
        "primary_family": found.family,
        "num_bootstrap": found.num_bootstrap,
        "num_users": len(found.runs[0].inputs.user_ids),
        "num_samples": found.runs[0].inputs.num_samples,
        "notes": found.notes,
    }


def build_page(found: Comparisons) -> content.Page:
    base = found.runs[0].label
    sections = [
        content.Section(
            "In short", [_sentence(label, base, found) for label in found.rows], figures=_figures(found)
        )
    ]
    if found.by_label:
        sections.append(
            content.Section(
                "Who gains, who pays",
                [
                    "The same comparison inside each value of the samples' labels; not corrected for the number of rows."
                ],
                tables=[content.Table(label_columns(base), label_rows(found.by_label, _row))],
            )
        )
    audits = compare_audits.audit_rows(found.runs)
    if audits:
        sections.append(
            content.Section(
                "What the predictions hang on",
                [compare_audits.EXPLANATION],
                tables=[content.Table(compare_audits.columns(found.runs), audits)],
            )
        )
    explanation = (
        f"Difference to {base} over the same users: 95 % interval, and for the primary family the interval at Holm's level. Effect size: "
        "difference / (standard error x square root of users), 0.2 small, 0.5 medium. Detectable: the smallest true difference that "
        "these users would show with 80 % power."
    )
    columns = [
        "metric",
        base,
        "run",
        "difference",
        "95 % interval",
        "Holm interval",
        "Holm p",
        "effect size",
        "detectable",
        "verdict",
    ]
    for label, rows in found.rows.items():
        table_rows = [_row(n, rows[n], found.metrics[n].higher_is_better) for n in found.family]
        sections.append(
            content.Section(
                f"{label} against {base}", [explanation], tables=[content.Table(columns, table_rows)]
            )
        )
    for label, rows in found.rows.items():
        others = [
            [
                *_row(n, row, found.metrics[n].higher_is_better)[:5],
                content.number(row.effect_size),
                row.verdict,
            ]
            for n, row in rows.items()
            if not row.family
        ]
        sections.append(
            content.Section(
                f"All other metrics: {label} against {base}",
                ["Descriptive: not corrected for the number of metrics."],
                tables=[content.Table([*columns[:5], "effect size", "verdict"], others)],
                folded=True,
            )
        )
    values = [
        [
            content.label(n) + " " + content.arrow(found.metrics[n].higher_is_better),
            *(f"{content.number(found.samples[r.label][n].value)}" for r in found.runs),
        ]
        for n in found.metrics
    ]
    sections.append(
        content.Section(
            "Side by side",
            ["All metrics of all runs."],
            tables=[content.Table(["metric", *(r.label for r in found.runs)], values)],
            folded=True,
        )
    )
    notes = [f"Note: {note}." for note in found.notes] + [
        f"{found.num_bootstrap:,} paired bootstrap replicates over users; percentile intervals for "
        "means, centred ones for curved statistics. Formulas: docs/evaluation.md."
    ]
    sections.append(content.Section("Conventions and notes", notes))
    first = found.runs[0]
    facts = [
        ("Baseline", base),
        ("Samples", f"{first.inputs.num_samples:,}"),
        ("Users", f"{len(first.inputs.user_ids):,}"),
        ("Catalogue", f"{first.inputs.num_items:,} items"),
        ("Objective", str(first.results.get("objective") or "–")),
    ]
    warning = next((n[0].upper() + n[1:] + "." for n in found.notes if n.startswith("not a result")), "")
    return content.Page("Comparison", " · ".join(r.label for r in found.runs), warning, facts, sections)


def _row(name: str, row: Comparison, higher: bool | None) -> list[str]:
    number, signed = content.number, lambda v: ("+" if v > 0 else "") + content.number(v)
    holm = "–" if row.ci_holm is None else f"{signed(row.ci_holm[0])} to {signed(row.ci_holm[1])}"
    return [
        f"{content.label(name)} {content.arrow(higher)}",
        number(row.baseline),
        number(row.value),
        signed(row.difference),
        f"{signed(row.ci_low)} to {signed(row.ci_high)}",
        holm,
        number(row.p_holm),
        number(row.effect_size),
        number(row.minimum_detectable),
        row.verdict,
    ]


def _sentence(label: str, base: str, found: Comparisons) -> str:
    rows = found.rows[label]
    groups: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for name in found.family:
        kind = rows[name].verdict if rows[name].verdict in groups else "open"
        groups[kind].append(
            content.label(name)
            + (
                f" ({100 * rows[name].difference / abs(rows[name].baseline):+.0f} %)"
                if rows[name].baseline
                else ""
            )
        )
    parts = [f"{kind} on {', '.join(names)}" for kind, names in groups.items() if names and kind != "open"]
    text = f"**{label}** against {base}: " + (
        "; ".join(parts) if parts else "no difference of the primary family is shown"
    )
    return text + (f"; interval spans zero for {', '.join(groups['open'])}." if groups["open"] else ".")


def _figures(found: Comparisons) -> list[dict[str, Any]]:
    drawn = []
    if {"ndcg@10", "mgu@5"} <= set(found.metrics):
        points = []
        for run in found.runs:
            x, y = (figure(found.samples[run.label][n], None) for n in ("mgu@5", "ndcg@10"))
            points.append(
                {
                    "x": x["value"],
                    "y": y["value"],
                    "x_low": x["ci_low"],
                    "x_high": x["ci_high"],
                    "y_low": y["ci_low"],
                    "y_high": y["ci_high"],
                    "label": run.label,
                    "series": run.label,
                }
            )
        if all(p["x"] is not None and p["y"] is not None for p in points):
            drawn.append(
                {
                    "kind": "scatter",
                    "title": "Accuracy against disparity",
                    "points": points,
                    "x_label": "MGU@5 (lower is better)",
                    "legend": False,
                    "y_label": "NDCG@10 (higher is better)",
                    "caption": "Up and to the left is better on both; whiskers are each run's own 95 % "
                    "interval (the paired differences in the tables are sharper).",
                }
            )
    series = []
    for label, rows in found.rows.items():
        shown = [rows[n] for n in found.family]
        series.append(
            {
                "name": label,
                "values": [r.effect_size * _sign(found, n) for r, n in zip(shown, found.family)],
                "low": [
                    _scaled(r, r.ci_low if _sign(found, n) > 0 else -r.ci_high)
                    for r, n in zip(shown, found.family)
                ],
                "high": [
                    _scaled(r, r.ci_high if _sign(found, n) > 0 else -r.ci_low)
                    for r, n in zip(shown, found.family)
                ],
            }
        )

    def cut(value: float) -> float | None:
        return None if value != value else max(-EFFECT_SHOWN, min(EFFECT_SHOWN, value))

    is_cut = any(abs(v) > EFFECT_SHOWN for s in series for v in s["values"])
    clean = [
        {"name": s["name"], **{k: [cut(v) for v in s[k]] for k in ("values", "low", "high")}} for s in series
    ]
    drawn.append(
        {
            "kind": "bar",
            "title": f"Improvement over {found.runs[0].label}",
            "categories": [content.label(n) for n in found.family],
            "series": clean,
            "horizontal": True,
            "y_label": "effect size (right is better)",
            "caption": "Differences in units of their spread over users, turned so that right is better; "
            "whiskers are 95 % intervals without "
            "correction, and a whisker over zero shows no difference."
            + (f" Bars beyond {EFFECT_SHOWN:g} are cut there." if is_cut else ""),
        }
    )
    return drawn


def _sign(found: Comparisons, name: str) -> int:
    return -1 if found.metrics[name].higher_is_better is False else 1


def _scaled(row: Comparison, bound: float) -> float:
    """A bound of the difference in effect-size units."""
    return bound * row.effect_size / row.difference if row.difference else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description=__doc__.split("\n")[0])
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="evaluation folders; the first is the baseline"
    )
    parser.add_argument(
        "--baseline",
        metavar="DIR",
        help="which of the folders the others are compared with (default: the first)",
    )
    parser.add_argument(
        "--output",
        default="comparison",
        metavar="DIR",
        help="where compare.md, .html and .json go (default: comparison)",
    )
    parser.add_argument(
        "--num-bootstrap",
        type=int,
        default=2000,
        metavar="B",
        help="paired bootstrap replicates (default: 2000)",
    )
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    try:
        folders = list(chosen.folders)
        if chosen.baseline:
            same = [f for f in folders if os.path.abspath(f) == os.path.abspath(chosen.baseline)]
            folders = [chosen.baseline, *(f for f in folders if f not in same)]
        if chosen.num_bootstrap < 100:
            raise UserError(
                f"--num-bootstrap is {chosen.num_bootstrap}", "give at least 100; 2000 is the default"
            )
        runs = [load_run(f, label) for f, label in zip(folders, labels_of(folders))]
        found = compare_runs(runs, chosen.num_bootstrap, chosen.seed)
        found.by_label = compare_by_label(
            runs, lambda part: compare_runs(part, chosen.num_bootstrap, chosen.seed)
        )
        output = Path(chosen.output)
        output.mkdir(parents=True, exist_ok=True)
        page = build_page(found)
        for name, text in (
            ("compare.md", render_markdown(page)),
            ("compare.html", render_html(page)),
            ("compare.json", json.dumps(to_json(found), indent=1)),
        ):
            (output / name).write_text(text, encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print(terminal_tables(found, _row))
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"written: {output / 'compare.html'}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
