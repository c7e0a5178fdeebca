"""The fault table: the real training command on tiny models, one fault per row, against undisturbed runs.

    make test-faults
    python tests/distributed/fault_table.py [--quick] [--rows save-points,nan] [--keep FOLDER] [--json]

Prints a markdown table; ends with status 1 if any row fails. --quick takes a few moments of each kind
instead of all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("PYTHONWARNINGS", "ignore")

from tests.distributed import fault_rows_kill, fault_rows_process, fault_rows_resume
from tests.distributed.fault_site import Failed, Site
from tests.distributed.ranks import preload

ROWS = [*fault_rows_resume.ROWS, *fault_rows_kill.ROWS, *fault_rows_process.ROWS]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few moments of each kind")
    parser.add_argument(
        "--rows",
        default="",
        help="comma-separated names; default: all of " + ", ".join(row.name for row in ROWS),
    )
    parser.add_argument(
        "--keep", type=Path, help="folder for runs and outputs, kept (default: a temporary one)"
    )
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    arguments = parser.parse_args()
    wanted = [name.strip() for name in arguments.rows.split(",") if name.strip()]
    unknown = set(wanted) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"unknown rows {sorted(unknown)}; rows: {', '.join(row.name for row in ROWS)}")
    preload()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="faults_"))
    site, results = Site(folder), []
    if not arguments.json:
        print("| fault | promise | seen | s | |\n|---|---|---|---|---|", flush=True)
    for row in ROWS:
        if wanted and row.name not in wanted:
            continue
        started, problem = time.monotonic(), None
        try:
            seen = row.check(site, arguments.quick)
        except Failed as error:
            problem, seen = str(error), str(error).splitlines()[0][:300]
        results.append(
            {
                "row": row.name,
                "claim": row.claim,
                "seen": seen,
                "seconds": round(time.monotonic() - started, 1),
                "ok": problem is None,
            }
        )
        if arguments.json:
            print(json.dumps(results[-1]), flush=True)
        else:
            print(
                f"| {row.name} | {row.claim} | {seen} | {results[-1]['seconds']:.0f} | "
                f"{'ok' if problem is None else 'FAILED'} |",
                flush=True,
            )
        if problem:
            print(problem, file=sys.stderr, flush=True)
    failed = [result["row"] for result in results if not result["ok"]]
    if not arguments.json:
        print(
            f"\n{len(results)} rows, {len(failed)} failed, {sum(r['seconds'] for r in results):.0f} s",
            flush=True,
        )
    if not arguments.keep and not failed:
        shutil.rmtree(folder, ignore_errors=True)
    elif failed:
        print(f"runs and outputs: {folder}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
