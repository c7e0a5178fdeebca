"""The first quarter of an hour: tunes by SFT and by GDRT from the same seed and data, evaluates, compares.

    python -m gdrt_ds.quickstart [--dir runs] [--parts planted learnt language] [--steps N] [--ranks N]

Three parts: the planted-shortcut corpus, where the truth is known and the effect is visible in a minute; a
small transformer that learns real data from scratch until it predicts better than popularity; and a real
language model with a 4-bit base and a fixed token budget. Every command that runs is printed: it is what a
user would type.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from gdrt_ds.files import write_json
from gdrt_ds.runtime import report_user_errors
from gdrt_ds.studies.quickstart_runs import language, learnt, planted, ranks_here

PARTS = ("planted", "learnt", "language")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gdrt_ds.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", default="runs", help="where the run folders go")
    parser.add_argument(
        "--ranks", type=int, help="of planted and language; default: one per GPU, or two CPU ranks"
    )
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of the language model (default: configs/quickstart.yaml)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all three")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with report_user_errors():
        started = time.time()
        base = Path(options.dir)
        ranks = options.ranks or ranks_here()
        seconds = {}
        if "planted" in options.parts:
            seconds |= planted(base, ranks)
        if "learnt" in options.parts:
            seconds |= learnt(base)
        if "language" in options.parts:
            seconds |= language(base, ranks, options.steps)
        print_ending(base, options.parts, seconds, time.time() - started)
        write_json(base / "quickstart.json", seconds)
    return 0


def print_ending(base: Path, parts: list[str], seconds: dict[str, float], total: float) -> None:
    """Where the time went and what to look at."""
    print("\nwhere the time went: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    print(f"quickstart: {total:.0f} s in all, installation not counted")
    pages = {
        "planted": "planted-comparison/compare.html",
        "learnt": "learnt-comparison/compare.html",
        "language": "quickstart-gdrt-eval/report.html",
    }
    print("look at: " + ", ".join(f"{base}/{pages[part]}" for part in PARTS if part in parts))
    print('next: your own data, see README, section "Your own data"')


if __name__ == "__main__":
    raise SystemExit(main())
