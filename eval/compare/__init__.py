"""Compares evaluations over the same users: `python -m eval.compare DIR DIR ...`.

runs.py        reads the folders and refuses those over other users or items
comparison.py  paired differences of every run to the baseline
slices.py      the same differences inside each value of a sample label
audits.py      the audits' headline effects side by side
page.py        compare.md and compare.html; figures.py draws, rows.py writes one difference as table cells
terminal.py    the tables on the terminal
"""

from eval.compare.comparison import Comparisons, compare_runs
from eval.compare.runs import Run, check_same, load_run

__all__ = ["Comparisons", "Run", "check_same", "compare_runs", "load_run"]
