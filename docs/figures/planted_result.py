"""Draws docs/figures/planted.png from planted.json: what GDRT gains on the planted corpus, and its price.

    python docs/figures/planted_result.py

The figures in the JSON file are those of docs/results-planted.md. This command measures them again, in
13 min 44 s on 2 CPU cores: `python -m gdrt_ds.study configs/studies/planted.yaml`.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

FOLDER = Path(__file__).parent
COLOURS = {"sft": "#9a9a9a", "gdrt": "#b2182b"}


def whiskers(rows: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Values [n] and distances to both ends of their intervals [2, n]."""
    values, low, high = np.array(rows).T
    return values, np.stack([values - low, high - values])


def draw_levels(axes, levels: dict) -> None:
    """NDCG@10 of both objectives for the two kinds of targets."""
    kinds = ("history", "shortcut")
    for shift, (name, rows) in zip((-0.18, 0.18), levels.items(), strict=True):
        values, spread = whiskers([rows[kind] for kind in kinds])
        places = np.arange(len(kinds)) + shift
        axes.bar(places, values, 0.34, color=COLOURS[name], label=name.upper())
        axes.errorbar(places, values, spread, fmt="none", color="black", capsize=3, linewidth=1)
    names = ["need the history\n(200 of 1,000 users)", "follow from the prompt\n(800 of 1,000 users)"]
    axes.set_xticks(range(len(kinds)), names)
    axes.set_ylim(0, 0.85)
    axes.set_ylabel("NDCG@10")
    axes.set_title("Targets that ...", loc="left", fontsize=11)
    axes.legend(frameon=False, ncols=2, loc="upper left")


def draw_differences(axes, differences: dict) -> None:
    """GDRT minus each control, on the targets that need the history."""
    values, spread = whiskers(list(differences.values()))
    places = np.arange(len(values))[::-1]
    axes.errorbar(values, places, xerr=spread, fmt="o", color=COLOURS["gdrt"], capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, list(differences))
    axes.set_ylim(-0.6, len(values) - 0.4)
    axes.set_xlim(-0.02, 0.23)
    axes.set_xlabel("difference in NDCG@10, 95 % interval")
    axes.set_title("Targets that need the history: GDRT minus ...", loc="left", fontsize=11)


def main() -> None:
    found = json.loads((FOLDER / "planted.json").read_text(encoding="utf-8"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), dpi=150, gridspec_kw={"wspace": 0.62})
    draw_levels(left, found["levels"])
    draw_differences(right, found["gdrt_minus"])
    for axes in (left, right):
        axes.spines[["right", "top"]].set_visible(False)
    figure.savefig(FOLDER / "planted.png", bbox_inches="tight")
    print(f"wrote {FOLDER / 'planted.png'}")


if __name__ == "__main__":
    main()
