"""report.md and report.html of an evaluation of rows, and its table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from eval.report import figures as drawn
from eval.report import read_training, write_page
from eval.report.content import audit_section, conventions_section, training_section
from eval.report.page import Card, Page, Section, Table
from eval.report.words import arrow, direction, label, number, span
from eval.rows.metrics import METRICS

DIMENSIONS = {"token_group": "group of the target token"}
HEADLINE = ("nll", "nll_calibrated", "accuracy", "nll_worst_group", "nll_gap_group")


def build_page(results: Mapping[str, Any], training: list[dict[str, Any]]) -> Page:
    """All sections, in reading order."""
    limit = results.get("limit")
    facts = [
        ("Training objective", results.get("objective")),
        ("Precision", results.get("dtype")),
        ("Split", results.get("split")),
        ("Rows", f"{results['num_samples']:,}"),
        ("Git", str(results.get("git_hash") or "")[:10]),
    ]
    sections = [_headline(results)]
    sections += training_section(training)
    sections += [_metrics(results), *_breakdowns(results)]
    sections += [audit_section(name, audit) for name, audit in (results.get("audits") or {}).items()]
    sections.append(conventions_section(results))
    trained = results.get("objective")
    return Page(
        "Evaluation report",
        f"{results['name']}, trained with {trained}" if trained else str(results["name"]),
        f"Not a result: limited to {limit} samples (--limit)." if limit else "",
        [(name, str(value)) for name, value in facts if value],
        sections,
    )


def _headline(results: Mapping[str, Any]) -> Section:
    meanings = {metric.name: metric.meaning for metric in METRICS}
    cards = []
    for name in HEADLINE:
        figure = results["metrics"].get(name)
        if figure is None or figure["value"] is None:
            continue
        marks = [("this run", figure["value"])]
        marks += [
            (floor, values[name]["value"])
            for floor, values in results["floors"].items()
            if (values.get(name) or {}).get("value") is not None
        ]
        cards.append(
            Card(
                label(name),
                number(figure["value"]),
                span(figure),
                meanings[name],
                direction(figure["higher_is_better"]),
                marks,
                figure["ci_low"],
                figure["ci_high"],
            )
        )
    text = (
        f"{results['num_samples']:,} rows. NLL is in nats per target token, over the whole vocabulary; "
        "the end of the completion counts as a token."
    )
    return Section("In short", [text], cards)


def _metrics(results: Mapping[str, Any]) -> Section:
    floors = results["floors"]
    rows = []
    for metric in METRICS:
        figure = results["metrics"].get(metric.name)
        if figure is None:
            continue
        rows.append(
            [
                f"{label(metric.name)} {arrow(metric.higher_is_better)}",
                number(figure["value"]),
                span(figure),
                *(number((values.get(metric.name) or {}).get("value")) for values in floors.values()),
                figure["n"],
                metric.meaning,
            ]
        )
    columns = ["metric", "value", "95 % interval", *floors, "n", "what it is"]
    return Section("All metrics", tables=[Table(columns, rows)])


def _breakdowns(results: Mapping[str, Any]) -> list[Section]:
    tables, figures = [], []
    for dimension, parts in results["breakdowns"].items():
        groups = parts["groups"]
        title = DIMENSIONS.get(dimension, dimension.removeprefix("label:").replace("_", " "))
        measures = list(parts["summary"])
        rows = [
            [name, max(f["n"] for f in values.values()), *(_cell(values.get(m)) for m in measures)]
            for name, values in groups.items()
        ]
        for part in ("worst", "gap", "ratio"):
            rows.append([part, "", *(_cell(parts["summary"][measure].get(part)) for measure in measures)])
        tables.append(Table(["group", "n", *(label(m) for m in measures)], rows, f"By {title}."))
        figures += [drawn.by_group(title, groups, measure) for measure in measures]
    if not tables:
        return []
    text = (
        "Each figure is over the tokens (NLL) or the rows (accuracy) of the group, with its 95 % interval. "
        "Worst, gap (max - min) and ratio (min / max) are over the groups."
    )
    return [Section("For whom it works", [text], tables=tables, figures=[f for f in figures if f])]


def _cell(figure: Mapping[str, Any] | None) -> str:
    return "–" if figure is None else f"{number(figure['value'])} ({span(figure)})"


def write_report(folder: Path, results: Mapping[str, Any], run: Path | None) -> list[Path]:
    """Writes report.md and report.html and returns their paths."""
    return write_page(folder, "report", build_page(results, read_training(run)))


def terminal_table(results: Mapping[str, Any]) -> RichTable:
    """The metrics, and below them the NLL of each group of target tokens."""
    floors = results["floors"]
    limit = results.get("limit")
    title = f"NOT A RESULT (limit {limit}): {results['name']}" if limit else str(results["name"])
    table = RichTable(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("metric", "value", "95 % interval", *floors):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, figure in results["metrics"].items():
        floor_cells = [number((values.get(name) or {}).get("value")) for values in floors.values()]
        title = f"{label(name)} {arrow(figure['higher_is_better'])}"
        table.add_row(Text(title), number(figure["value"]), span(figure), *floor_cells)
    groups = (results["breakdowns"].get("token_group") or {}).get("groups") or {}
    for name, values in groups.items():
        figure = values["nll"]
        blank = [""] * len(floors)
        table.add_row(Text(f"  NLL of {name}"), number(figure["value"]), span(figure), *blank)
    return table
