"""Runs a study: a grid of objectives, settings and seeds, then one page about all of it.

    python -m gdrt_ds.study configs/studies/planted.yaml [--workers N] [--piece NAME] [key.sub=value ...]
    python -m gdrt_ds.study FILE --list      the cells with their state
    python -m gdrt_ds.study FILE --cell K    one cell, e.g. --cell $SLURM_ARRAY_TASK_ID in a job array
    python -m gdrt_ds.study FILE --only A,B  cells by name
    python -m gdrt_ds.study FILE --report    the page from whatever is evaluated so far

    python -m gdrt_ds.study FILE --keep FOLDER   each finished cell as one small file; another machine goes
                                             on from them

    python -m gdrt_ds.study FILE --piece NAME run.max_minutes=40   saves and ends when 40 minutes are over

Started again it goes on: a completed run is not trained again, an interrupted one resumes, and an evaluation
that exists is kept. The keys of a study file are described in gdrt_ds/studies/grid.py.
"""

from __future__ import annotations

import argparse

from gdrt_ds.completion import offer_completion
from gdrt_ds.invocation import command_name
from gdrt_ds.runtime import report_user_errors
from gdrt_ds.studies.runner import run_study


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("python -m gdrt_ds.study"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="study file, e.g. configs/studies/planted.yaml")
    parser.add_argument("--dir", help="folder of the study (default runs/studies/NAME)")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that train side by side (default: GPUs, or CPU cores; 1 with several ranks); more "
        "than there are GPUs share them in turn",
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--piece", help="a named part of the grid")
    part.add_argument("--cell", type=int, help="one cell by its number; no page is written")
    part.add_argument("--only", metavar="NAMES", help="cells by name, with commas; no page is written")
    # A worker's cell whose needed run failed fails alone, and the others go on.
    parser.add_argument("--as-worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--keep",
        metavar="FOLDER",
        help="keep each finished cell there as one small file, and take cells from there that are not here",
    )
    parser.add_argument("--list", action="store_true", help="print the cells and their state, and exit")
    parser.add_argument(
        "--report", action="store_true", help="write the page from what is evaluated, and exit"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings of all cells")
    offer_completion(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with report_user_errors():
        return run_study(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
