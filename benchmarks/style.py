"""How a code base reads, in five figures: long lines, comments, dense assignments and ternaries.

    python benchmarks/style.py [--peer NAME=FOLDER ...] [--json]

Counts the Python files of gdrt_ds/ and eval/, and of other code bases where a folder is given. Tests,
generated files and vendored copies are left out by folder name. The table of docs/style-table.md is
this script's output.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {"tests", "test", "third_party", "build", ".venv", "docs", "examples"}


def python_files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*.py") if not LEFT_OUT & set(path.relative_to(folder).parts[:-1])
    )


def measure(folders: list[Path]) -> dict[str, float]:
    """Shares of lines in percent, and counts per 1,000 lines."""
    lines = over_100 = over_120 = comments = tuples = ternaries = 0
    for path in (file for folder in folders for file in python_files(folder)):
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a template, or another version of Python
            continue
        rows = text.splitlines()
        lines += len(rows)
        over_100 += sum(len(row) > 100 for row in rows)
        over_120 += sum(len(row) > 120 for row in rows)
        comments += sum(row.lstrip().startswith("#") for row in rows)
        for node in ast.walk(tree):
            ternaries += isinstance(node, ast.IfExp)
            if isinstance(node, ast.Assign):
                # Several values assigned in one statement; unpacking of a single value is not counted.
                tuples += isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    return {
        "lines": lines,
        "over 100 columns, %": round(100 * over_100 / max(lines, 1), 1),
        "over 120 columns, %": round(100 * over_120 / max(lines, 1), 1),
        "comment-only lines, %": round(100 * comments / max(lines, 1), 1),
        "tuple assignments per 1,000": round(1000 * tuples / max(lines, 1), 1),
        "ternaries per 1,000": round(1000 * ternaries / max(lines, 1), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--json", action="store_true", help="one JSON line per code base")
    parser.add_argument("--quick", action="store_true", help="accepted like everywhere; this is quick anyway")
    options = parser.parse_args()
    found = {"gdrt_ds": measure([ROOT / "gdrt_ds"]), "eval": measure([ROOT / "eval"])}
    for peer in options.peer:
        name, _, folder = peer.partition("=")
        found[name] = measure([Path(folder)])
    if options.json:
        for name, figures in found.items():
            print(json.dumps({"name": name, **figures}))
        return 0
    print("| | " + " | ".join(found) + " |")
    print("|---|" + "---|" * len(found))
    for key in next(iter(found.values())):
        print(f"| {key} | " + " | ".join(f"{figures[key]:,}" for figures in found.values()) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
