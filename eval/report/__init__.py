"""Reports of one evaluation: report.md, report.html (one self-contained page), and the same table for the terminal.

    from eval.report import write_report, terminal_table
    write_report(folder, results, predictions, catalogue.entries, run_folder=run)
    rich.print(terminal_table(results))

`results` is the content of results.json: "metrics" and "breakdowns" and "notes" (from eval.metrics.evaluate), "floors"
({name: metrics}; the name "targets" is the test targets themselves), "config", "versions", "git_hash", "objective", "mode",
"dtype", "limit", "audits". Missing keys leave their section out.

Audits fill in `results["audits"] = {name: audit}` with
    audit = {"title": str, "question": str, "finding": str (one sentence),
             "table": {"columns": [str], "rows": [[str | number | None]]} | None,
             "figures": [figure, ...], "control": str, "cost": str}

Figures: plain dictionaries (they survive JSON), drawn by eval.report.plots as inline SVG that follows the reader's light or
dark mode. All have "kind", "title" and "caption" (one sentence that says what to see). Optional everywhere but in tokens:
"x_label", "y_label", "legend": False, "percent": True (share axis),
"ordered": True (series are ordered groups: one colour ramp instead of distinct colours),
"smooth": True (a noisy curve is drawn faint under its moving average),
"reference": {"value": y, "label": str} (a dashed line). None in a list of numbers is a gap.
    bar           "categories": [str], "series": [{"name": str, "values": [y], "low": [y]?, "high": [y]?}],
                  "stacked": bool?, "horizontal": bool?
    line          "series": [{"name": str, "x": [x], "y": [y], "low": [y]?, "high": [y]?}], "log_x": bool?, "log_y": bool?
    stacked_area  "x": [x], "series": [{"name": str, "y": [y]}]       (shares, or counts per step)
    scatter       "points": [{"x": x, "y": y, "label": str?, "series": str?, "x_low", "x_high", "y_low", "y_high"?}],
                  "log_x": bool?, "log_y": bool?
    heatmap       "rows": [str], "columns": [str], "values": [[v]]    (numbers are written into the cells)
    tokens        "prompts": [{"title": str?, "tokens": [{"text": str, "segment": "instruction"|"template"|"history"|"target",
                  "group": int?, "weight": float?}]}], "num_groups": int?
                  Tokens with a group are coloured along the group ramp (0 = least, last = most tied to auxiliary tokens);
                  tokens with a weight by its share of the prompt's largest |weight| (warm: raises, cool: lowers).
An unknown kind or a series of the wrong length raises UserError: a figure is never dropped silently.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Mapping, Sequence

from eval.report.content import build_sections, terminal_table
from eval.report.html import render_html
from eval.report.markdown import render_markdown

__all__ = ["write_report", "terminal_table", "write_catalogue"]


def write_report(
    folder: str | Path,
    results: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    catalogue_entries: Sequence[Any],
    *,
    run_folder: str | Path | None = None,
    history_item_counts: Mapping[str, float] | None = None,
) -> list[Path]:
    """Write report.md, report.html and catalogue.jsonl (what eval.compare and outsiders need to recompute every metric).

    run_folder: a training run, whose metrics.jsonl gives the training curves. history_item_counts: as for `evaluate`.
    Returns the written paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = build_sections(
        results,
        predictions,
        catalogue_entries,
        training=read_training(run_folder),
        history_item_counts=history_item_counts,
    )
    return [
        _write(folder / "report.md", render_markdown(page)),
        _write(folder / "report.html", render_html(page)),
        write_catalogue(folder / "catalogue.jsonl", catalogue_entries, history_item_counts),
    ]


def write_catalogue(
    path: Path, catalogue_entries: Sequence[Any], history_item_counts: Mapping[str, float] | None = None
) -> Path:
    """The run folder's catalogue.jsonl plus, where known, history_count (occurrences in train histories) per entry."""
    lines = []
    for entry in catalogue_entries:
        row = {
            "item_id": entry.item_id,
            "merged_ids": list(entry.merged_ids or ()),
            "text": entry.text,
            "train_count": entry.train_count,
            "provider": entry.provider,
            "groups": entry.groups or {},
        }
        if history_item_counts is not None:
            row["history_count"] = sum(
                history_item_counts.get(i, 0) for i in {entry.item_id, *(entry.merged_ids or ())}
            )
        lines.append(json.dumps(row, ensure_ascii=False))
    return _write(path, "\n".join(lines) + "\n")


def read_training(run_folder: str | Path | None) -> list[dict[str, Any]]:
    """Rows of RUN/metrics.jsonl; empty without a run folder or before the first step. A torn last line is left out."""
    path = None if run_folder is None else Path(run_folder) / "metrics.jsonl"
    if path is None or not path.exists():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return rows


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
