"""Compares evaluations over the same users.

    python -m eval.compare DIR DIR ... [--baseline DIR] [--output DIR]

Every DIR is an evaluation folder (results.json, predictions.jsonl, catalogue.jsonl). Differences are paired:
the same bootstrap draws of users go through all runs. Holm's correction runs over the primary family
(NDCG@10, HR@10, MRR, NLL, MGU@5, DGU@5, CVaR of NLL). Writes compare.md, compare.html and compare.json; the
table goes to the terminal.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from eval.compare.comparison import Comparisons, compare_runs, to_json
from eval.compare.page import build_page
from eval.compare.runs import load_run
from eval.compare.slices import compare_slices, label_notes
from eval.compare.terminal import terminal_tables
from eval.folders import labels_of
from eval.report import write_page
from gdrt_ds.completion import offer_completion
from gdrt_ds.errors import UserError
from gdrt_ds.files import write_json
from gdrt_ds.invocation import command_name

FEWEST_REPLICATES = 100


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=command_name("python -m eval.compare"), description=__doc__.split("\n")[0]
    )
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
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap draws (default: 0)")
    offer_completion(parser)
    return parser.parse_args(arguments)


def baseline_first(folders: list[str], baseline: str | None) -> list[str]:
    """The folders with the baseline in front."""
    if baseline is None:
        return folders
    others = [folder for folder in folders if os.path.abspath(folder) != os.path.abspath(baseline)]
    return [baseline, *others]


def compare_folders(folders: Sequence[str | Path], num_bootstrap: int, seed: int) -> Comparisons:
    """Reads the folders and compares them, slices included.

    Raises:
        UserError: a folder cannot be read or compared, or there are too few replicates.
    """
    if num_bootstrap < FEWEST_REPLICATES:
        raise UserError(
            f"--num-bootstrap is {num_bootstrap}",
            f"give at least {FEWEST_REPLICATES}; 2000 is the default",
        )
    runs = [load_run(folder, label) for folder, label in zip(folders, labels_of(folders), strict=True)]
    found = compare_runs(runs, num_bootstrap, seed)
    found.slices = compare_slices(runs, num_bootstrap, seed)
    found.notes += label_notes(runs)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    output = Path(options.output)
    try:
        folders = baseline_first(options.folders, options.baseline)
        found = compare_folders(folders, options.num_bootstrap, options.seed)
        write_page(output, "compare", build_page(found))
        write_json(output / "compare.json", to_json(found))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print(terminal_tables(found))
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"written: {output / 'compare.html'}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
