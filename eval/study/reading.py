"""Reads the folder of a study: what grid.json asks for, what is evaluated, and what the runs cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.folders import is_evaluation
from gdrt_ds.errors import UserError
from gdrt_ds.files import read_summary


@dataclass(frozen=True)
class Grid:
    """A study as grid.json names it.

    Attributes:
        study: its question, rows, settings, baseline and controls.
        cells: the evaluated ones; each names its row, setting, seed, run folder and evaluation folder.
        absent: the names of cells that are not evaluated yet.
    """

    study: Mapping[str, Any]
    cells: list[dict[str, Any]]
    absent: list[str]

    def cells_of(self, setting: str) -> list[dict[str, Any]]:
        """The cells of a setting, and those that it borrows from other settings, for its own seeds.

        Borrowed cells are trained once and shown in several settings (gdrt_ds/studies/grid.py).
        """
        mine = [cell for cell in self.cells if cell["setting"] == setting]
        seeds = {cell["seed"] for cell in mine}
        settings = self.study["settings"]
        borrows = (settings[setting].get("borrows") or {}) if isinstance(settings, Mapping) else {}
        for lender, rows in borrows.items():
            mine += [
                cell
                for cell in self.cells
                if cell["setting"] == lender and cell["row"] in rows and cell["seed"] in seeds
            ]
        return mine


def read_grid(folder: Path) -> Grid:
    """Reads grid.json and looks which cells are evaluated.

    Raises:
        UserError: grid.json cannot be read, or nothing is evaluated.
    """
    try:
        grid = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}/grid.json cannot be read ({error})", "give the folder of `python -m gdrt_ds.study`"
        ) from None
    done = []
    absent = []
    for cell in grid["cells"]:
        if is_evaluation(folder / cell["evaluation"]):
            done.append(cell)
        else:
            absent.append(cell["name"])
    if not done:
        raise UserError(
            f"{folder}: no cell of the study is evaluated yet",
            "python -m gdrt_ds.study FILE trains and evaluates them",
        )
    return Grid(grid["study"], done, absent)


def totals_of(folder: Path, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What the evaluated cells cost and ran on, from the summaries of their runs."""
    summaries = [read_summary(folder / cell["run"]) for cell in cells]
    return {
        "cells": len(cells),
        "train_seconds": round(sum(summary.get("seconds", 0) for summary in summaries)),
        "devices": sorted({summary.get("device", "?") for summary in summaries}),
        "worlds": sorted({summary.get("world", 1) for summary in summaries}),
        "git": sorted({str(summary.get("git_hash"))[:12] for summary in summaries}),
        "steps": sorted({summary.get("adapter_step", summary.get("step", 0)) for summary in summaries}),
        "versions": summaries[0].get("versions", {}),
    }
