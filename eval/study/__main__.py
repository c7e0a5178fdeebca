"""One page about a whole study: rows x metrics, with differences to the baseline and to the controls.

    python -m eval.study STUDY_DIR                    writes study.html, study.md and study.json into it
    python -m eval.study --evaluate RUN RUN ... [--arguments JSON]
                                                      evaluates several runs in one process (imports are paid
                                                      once)
STUDY_DIR is what `python -m gdrt_ds.study` made: grid.json and runs/. Cells that are not evaluated yet are
named on the page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.numbers import FEWEST_RESAMPLES, USUAL_RESAMPLES, refuse_below
from eval.report import write_page
from eval.report.page import Page
from eval.study.batch import evaluate_runs
from eval.study.blocks import load_blocks
from eval.study.page import build_page, to_json
from eval.study.reading import read_grid, totals_of
from gdrt_ds.errors import UserError
from gdrt_ds.files import write_json
from gdrt_ds.invocation import command_name


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=command_name("python -m eval.study"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", help="folder of a study")
    parser.add_argument("--evaluate", nargs="+", metavar="RUN", help="evaluate these runs and exit")
    parser.add_argument(
        "--arguments", default="[]", metavar="JSON", help="arguments of eval.run, as a JSON list"
    )
    parser.add_argument("--num-bootstrap", type=int, default=1000, metavar="B", help="draws of users")
    return parser.parse_args(arguments)


def write_study(folder: Path, num_bootstrap: int) -> Page:
    """Writes study.html, study.md and study.json into the folder of a study.

    Raises:
        UserError: it is not a study, nothing in it is evaluated, or its cells cannot be compared.
    """
    grid = read_grid(folder)
    blocks = load_blocks(folder, grid, num_bootstrap)
    totals = totals_of(folder, grid.cells)
    page = build_page(grid, blocks, totals)
    write_json(folder / "study.json", to_json(grid, blocks, totals))
    write_page(folder, "study", page)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    try:
        if options.evaluate:
            # A status has eight bits; 64 failures are as many as need to be told apart.
            return min(64, evaluate_runs(options.evaluate, json.loads(options.arguments)))
        if not options.folder:
            raise UserError("no study is given", "python -m eval.study STUDY_DIR")
        refuse_below(FEWEST_RESAMPLES, "--num-bootstrap", options.num_bootstrap, USUAL_RESAMPLES)
        page = write_study(Path(options.folder), options.num_bootstrap)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in page.sections[0].paragraphs:
        print(line.replace("**", ""))
    print(f"written: {options.folder}/study.html, study.md, study.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
