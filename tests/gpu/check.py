"""Everything that needs a GPU, in one command, for the day that one is there: under ten minutes on one card.

    make gpu-check            or: python tests/gpu/check.py [--layers 8] [--only loss attention] [--dry]

Works from a copied tree with the packages installed: no git, no network. Each part runs in a process of its
own, because a failed assertion on the device ends the process. The table is printed, and written to --output
in the form of docs/benchmarks.md. Exit status: 0 all bounds are kept, 1 one is not, 2 there is no GPU.
--dry runs all parts on the CPU at toy size, so that the parts are not broken when they are first needed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.gpu.rows import Row, Spot  # noqa: E402

PARTS = {
    "loss": 120,
    "attention": 180,
    "four_bit": 60,
    "step": 240,
    "run": 150,
    "cards": 60,
    "benchmarks": 370,
}
"""Part, in the order of use, and the seconds after which it is ended."""
ALL_S = 590
"""Seconds for all parts; what is left of them bounds the last ones."""
FOUND = "found: "


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8, help="layers of the 7B shape in the training step")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--dry", action="store_true", help="on the CPU at toy size")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check.md"))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_part(options: argparse.Namespace) -> int:
    """Runs one part in this process; its rows go to the standard output as JSON."""
    import torch

    device = torch.device("cpu") if options.dry else torch.device("cuda", 0)
    spot = Spot(device, options.layers, options.folder)
    for row in importlib.import_module(f"tests.gpu.part_{options.part}").run(spot):
        print(FOUND + row.line(), flush=True)
    return 0


def start_part(part: str, options: argparse.Namespace, folder: str, limit_s: float) -> list[dict]:
    """The rows of a part that runs in a process of its own; a part that breaks is a row that is not kept."""
    command = [sys.executable, __file__, "--part", part, "--folder", folder, "--layers", str(options.layers)]
    if options.dry:
        command.append("--dry")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    started = time.monotonic()
    broken = ""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s
        )
        output = done.stdout
        if done.returncode:
            broken = f"status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}"
            sys.stderr.write(done.stderr[-4000:])
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        broken = f"not finished in {limit_s:.0f} s"
    lines = [line.removeprefix(FOUND) for line in output.splitlines() if line.startswith(FOUND)]
    rows = [{"part": part, **json.loads(line)} for line in lines]
    if broken or not rows:
        failed = Row("the part", broken or "gave no rows", "ends", False)
        rows.append({"part": part, **json.loads(failed.line())})
    print(f"{part}: {len(rows)} rows in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict], machine: str) -> str:
    words = {True: "kept", False: "**not kept**", None: ""}
    lines = [f"`make gpu-check` — {machine}", ""]
    lines += ["| part | what | found | bound | |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["part"], row["what"], row["found"], row["bound"], words[row["kept"]]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.part:
        return run_part(options)
    import torch

    if not options.dry and not torch.cuda.is_available():
        print(
            "no GPU that torch can use: nothing was checked (--dry runs all parts on the CPU)",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from machine_line import machine

    rows = []
    deadline = time.monotonic() + ALL_S
    with tempfile.TemporaryDirectory() as folder:
        for part in options.only:
            left = max(1.0, deadline - time.monotonic())
            rows += start_part(part, options, folder, min(PARTS[part], left))
    text = table(rows, machine() + (", --dry" if options.dry else ""))
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    return 1 if any(row["kept"] is False for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
