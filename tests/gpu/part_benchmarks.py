"""The benchmarks on the card: each script with a limit of time, its ratios as rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.gpu.rows import Row, Spot

ROOT = Path(__file__).resolve().parents[2]
SUITE = {
    "group_loss.py": (["--no-slow", "--repeats", "5"], 120),
    "dro_overhead.py": (["--quick"], 60),
    "zero3_overhead.py": (["--quick"], 60),
    "train_step.py": (["--quick"], 90),
    "scoring.py": (["--quick"], 90),
}
"""Script: its arguments on a card, and the seconds that it may take."""
TOY = {"group_loss.py": (["--quick", "--no-slow", "--repeats", "1", "--model", "SmolLM2-135M"], 120)}


def run(spot: Spot) -> list[Row]:
    rows = []
    for script, (arguments, limit_s) in (TOY if spot.dry else SUITE).items():
        command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--json"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            rows.append(Row(script, f"not finished in {limit_s} s", "finishes", False))
            continue
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            rows.append(Row(script, f"status {done.returncode}: {last[:120]}", "status 0", False))
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                figures = json.loads(line)
                rows.append(Row(f"{script}: {figures['name']}", f"ratio {figures.get('ratio')}"))
    return rows
