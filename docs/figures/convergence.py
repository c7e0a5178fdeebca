"""Draws docs/figures/convergence.png: what validation and attribution do while a model learns real data.

    python docs/figures/convergence.py [--studies small_transformer_ml100k real_ml100k]

One row of panels per study, from its kept cells in docs/studies/cells/STUDY (`gdrt_ds.study --keep`): the
loss of the target among the catalogue's titles, the attribution ratio and the history sensitivity, over the
targets that were trained on. The last two are those of the audit `drift`, whose users also give the first
where not every run of the study measured it in its validation. Cells without that audit are named and left
out. Thin lines are single seeds, thick ones their mean.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

FOLDER = Path(__file__).parent
CELLS = FOLDER.parent / "studies" / "cells"
TITLES = {
    "small_transformer_ml100k": "a small transformer from scratch",
    "real_ml100k": "SmolLM2-135M",
}
COLOURS = {"sft": "#7a7a7a", "gdrt": "#b2182b", "gdrt-tau-3": "#e08214", "msl": "#2166ac"}
NAMES = {"gdrt": "GDRT, tau 1", "gdrt-tau-3": "GDRT, tau 3"}
PANELS = (
    ("validation", "NLL of the title, nats", "lower is better"),
    ("log2 auxiliary:interaction", "attribution, log2 prompt : history", "lower leans more on the history"),
    ("history sensitivity", "another user's history costs, nats", "0: the history is not read"),
)
Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Cell:
    """One run: its row in the study and, by panel, (targets seen, values).

    "audited" is the first panel from the audit, which every cell has.
    """

    row: str
    curves: dict[str, Curve]


def read_cell(path: Path) -> Cell | None:
    """Reads a kept cell."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        text = archive.read("config.yaml").decode("utf-8")
        settings = yaml.safe_load(text.replace("{study}", "study"))  # a word for the folder that it was in
        validation = [json.loads(line) for line in archive.read("validation.jsonl").splitlines()]
        found = next(name for name in names if name.startswith("eval/") and name.endswith("/results.json"))
        audits = json.loads(archive.read(found))["audits"]
    if "drift" not in audits:
        print(f"left out, without the audit drift: {path.relative_to(CELLS)}")
        return None
    batch = settings["train"]["global_batch"]
    curves = {name: drift_curve(audits["drift"], name, batch) for name, _, _ in PANELS[1:]}
    curves["audited"] = drift_curve(audits["drift"], "target NLL", batch)
    if "catalogue_nll" in validation[0]:
        curves["validation"] = curve([(line["step"] * batch, line["catalogue_nll"]) for line in validation])
    return Cell(path.stem.rsplit("-seed", 1)[0], curves)


def curve(points: list[tuple[float, float]]) -> Curve:
    x, y = np.array(points, dtype=float).T
    return x, y


def drift_curve(audit: dict[str, Any], name: str, batch: int) -> Curve:
    """A column of the audit's table. Step 0 is the base model, which does not know the task."""
    columns = audit["table"]["columns"]
    place = columns.index(name)
    return curve([(row[0] * batch, row[place]) for row in audit["table"]["rows"] if row[0] > 0])


def mean_curve(curves: list[Curve]) -> Curve:
    """Mean over the seeds, as far as all of them trained.

    The audit takes about ten checkpoints of a run, and not the same steps in each. Between two of them a
    seed's value is taken from the straight line.
    """
    first = max(x[0] for x, _ in curves)
    last = min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(first <= grid) & (grid <= last)]
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)


def draw(axes, cells: list[Cell], panel: str) -> None:
    by_row: dict[str, list[Curve]] = defaultdict(list)
    for cell in cells:
        if cell.row in COLOURS:
            by_row[cell.row].append(cell.curves[panel])
    for row in COLOURS:
        if row not in by_row:
            continue
        for x, y in by_row[row] if len(by_row[row]) > 1 else []:
            axes.plot(x / 1000, y, color=COLOURS[row], linewidth=0.6, alpha=0.6)
        x, y = mean_curve(by_row[row])
        seeds = len(by_row[row])
        label = f"{NAMES.get(row, row.upper())}, {seeds} seed{'s' if seeds > 1 else ''}"
        axes.plot(x / 1000, y, color=COLOURS[row], linewidth=2, label=label)
    axes.spines[["right", "top"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", nargs="+", default=list(TITLES))
    options = parser.parse_args()
    found = {
        study: [cell for path in sorted((CELLS / study).glob("*.zip")) if (cell := read_cell(path))]
        for study in options.studies
    }
    found = {study: cells for study, cells in found.items() if cells}
    figure, grid = plt.subplots(len(found), 3, figsize=(12, 3.4 * len(found)), dpi=150, squeeze=False)
    for row, (study, cells) in zip(grid, found.items()):
        validated = all("validation" in cell.curves for cell in cells)
        for axes, (panel, label, hint) in zip(row, PANELS):
            draw(axes, cells, "audited" if panel == "validation" and not validated else panel)
            axes.set_ylabel(label)
            axes.set_title(hint, loc="left", fontsize=9)
            axes.set_xlabel("thousand targets seen")
        row[0].set_title(f"{TITLES.get(study, study)}: lower is better", loc="left", fontsize=9)
        row[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(FOLDER / "convergence.png")
    print(f"wrote {FOLDER / 'convergence.png'} from {sum(map(len, found.values()))} cells")


if __name__ == "__main__":
    main()
