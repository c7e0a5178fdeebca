"""Reports of one evaluation: report.md, report.html (one self-contained page), and the same table for the
terminal.

    from eval.report import write_report, terminal_table
    write_report(folder, results, predictions, catalogue.entries, run_folder=run)
    rich.print(terminal_table(results))

`results` is the content of results.json: "metrics" and "breakdowns" and "notes" (from eval.metrics.evaluate),
"floors" ({name: metrics}; the name "targets" is the test targets themselves), "config", "versions",
"git_hash", "objective" (what was trained), "scoring", "mode", "dtype", "limit", "audits". Missing keys leave
their section out.

Audits fill in `results["audits"] = {name: audit}` with
    audit = {"title": str, "question": str, "finding": str (one sentence),
             "table": {"columns": [str], "rows": [[str | number | None]]} | None,
             "figures": [figure, ...], "control": str, "cost": str}

Figures: plain dictionaries (they survive JSON), drawn by eval.report.plots as inline SVG that follows the
    reader's light or dark mode. All have "kind", "title" and "caption" (one sentence that says what to see).
    Optional everywhere but in tokens: "x_label", "y_label", "legend": False, "percent": True (share axis),
    "ordered": True (series are ordered groups: one colour ramp instead of distinct colours), "smooth": True
    (a noisy curve is drawn faint under its moving average), "reference": {"value": y, "label": str} (a dashed
    line). None in a list of numbers is a gap.
    bar           "categories": [str], "series": [{"name": str, "values": [y], "low": [y]?, "high": [y]?}],
                  "stacked": bool?, "horizontal": bool?
    line          "series": [{"name": str, "x": [x], "y": [y], "low": [y]?, "high": [y]?}], "log_x": bool?,
    "log_y": bool?
    stacked_area  "x": [x], "series": [{"name": str, "y": [y]}]       (shares, or counts per step)
    scatter       "points": [{"x": x, "y": y, "label": str?, "series": str?, "x_low", "x_high", "y_low",
    "y_high"?}],
                  "log_x": bool?, "log_y": bool?
    heatmap       "rows": [str], "columns": [str], "values": [[v]]    (numbers are written into the cells)
    tokens        "prompts": [{"title": str?, "tokens": [{"text": str, "segment":
    "instruction"|"template"|"history"|"target",
                  "group": int?, "weight": float?}]}], "num_groups": int? Tokens with a group are coloured
                  along the group ramp (0 = least, last = most tied to auxiliary tokens); tokens with a weight
                  by its share of the prompt's largest |weight| (warm: raises, cool: lowers).
An unknown kind or a series of the wrong length raises UserError: a figure is never dropped silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report.content import build_sections, terminal_table
from eval.report.html import render_html
from eval.report.markdown import render_markdown
from eval.report.page import Page
from gdrt_ds.files import write_text

__all__ = ["read_training", "terminal_table", "write_catalogue", "write_page", "write_report"]


def write_page(folder: str | Path, name: str, page: Page) -> list[Path]:
    """Writes NAME.md and NAME.html and returns their paths. The folder is made if it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    markdown = folder / f"{name}.md"
    html = folder / f"{name}.html"
    write_text(markdown, render_markdown(page))
    write_text(html, render_html(page))
    return [markdown, html]


def write_report(
    folder: str | Path,
    results: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    catalogue_entries: Sequence[Any],
    *,
    run_folder: str | Path | None = None,
    history_item_counts: Mapping[str, float] | None = None,
) -> list[Path]:
    """Writes report.md, report.html and catalogue.jsonl.

    catalogue.jsonl is what eval.compare and outsiders need to compute every metric again.

    Args:
        results: the content of results.json.
        run_folder: a training run, whose metrics.jsonl gives the training curves.
        history_item_counts: as for `eval.metrics.evaluate`.
    Returns:
        the written paths.
    """
    page = build_sections(
        results,
        predictions,
        catalogue_entries,
        training=read_training(run_folder),
        history_item_counts=history_item_counts,
    )
    written = write_page(folder, "report", page)
    catalogue = Path(folder) / "catalogue.jsonl"
    return [*written, write_catalogue(catalogue, catalogue_entries, history_item_counts)]


def write_catalogue(
    path: Path, catalogue_entries: Sequence[Any], history_item_counts: Mapping[str, float] | None = None
) -> Path:
    """Writes one JSON object per catalogue entry and returns the path.

    The keys are those of the run folder's catalogue.jsonl (a name where the entry has one) and, where it is
    known, `history_count`: how often the entry occurs in training histories.
    """
    lines = []
    for entry in catalogue_entries:
        merged = list(entry.merged_ids or ())
        row = {
            "item_id": entry.item_id,
            "merged_ids": merged,
            "text": entry.text,
            "train_count": entry.train_count,
            "provider": entry.provider,
            "groups": entry.groups or {},
        }
        if getattr(entry, "name", None) is not None:
            row["name"] = entry.name
        if history_item_counts is not None:
            ids = {entry.item_id, *merged}
            row["history_count"] = sum(history_item_counts.get(item, 0) for item in ids)
        lines.append(json.dumps(row, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")
    return path


def trained_in(run: Path | None, adapter: object) -> Path | None:
    """The run whose training made the model that is scored: none where it is the base without its adapter."""
    return None if adapter is None else run


def read_training(run_folder: str | Path | None) -> list[dict[str, Any]]:
    """Rows of RUN/metrics.jsonl; empty without a run folder or before the first step.

    A last line that a killed process left unfinished is left out.

    Raises:
        json.JSONDecodeError: another line is damaged.
    """
    path = None if run_folder is None else Path(run_folder) / "metrics.jsonl"
    if path is None or not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return rows
