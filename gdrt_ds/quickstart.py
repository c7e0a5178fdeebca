"""The first quarter of an hour: tunes by SFT and by GDRT from the same seed and data, evaluates, compares.

    python -m gdrt_ds.quickstart [--dir runs] [--steps N] [--skip-planted] [--ranks N]

Two parts: the planted-shortcut corpus, where the truth is known and the effect is visible in a minute,
then a real small language model on real data with a fixed token budget. Every command that runs is
printed: it is what a user would type.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from gdrt_ds.files import write_json
from gdrt_ds.runtime import report_user_errors
from gdrt_ds.studies.quickstart_runs import planted, ranks_here, real


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gdrt_ds.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", default="runs", help="where the run folders go")
    parser.add_argument("--ranks", type=int, help="default: one per GPU, or two CPU ranks")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of the real part (default: configs/quickstart.yaml)"
    )
    parser.add_argument("--skip-planted", action="store_true", help="the real part only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with report_user_errors():
        started = time.time()
        base = Path(options.dir)
        ranks = options.ranks or ranks_here()
        seconds = {}
        if not options.skip_planted:
            seconds |= planted(base, ranks)
        seconds |= real(base, ranks, options.steps)
        print_ending(base, seconds, time.time() - started)
        write_json(base / "quickstart.json", seconds)
    return 0


def print_ending(base: Path, seconds: dict[str, float], total: float) -> None:
    """Where the time went and what to look at."""
    print("\nwhere the time went: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    print(f"quickstart: {total:.0f} s in all, installation not counted")
    print(
        f"look at: {base}/quickstart-comparison/compare.html, {base}/planted-comparison/compare.html, "
        f"{base}/quickstart-gdrt-eval/report.html"
    )
    print('next: your own data, see README, section "Your own data"')


if __name__ == "__main__":
    raise SystemExit(main())
