"""No line over 110 columns in any text file of this repository: a part of `make lint`.

    python tests/columns.py [FOLDER]

Prints every line that is too long as FILE:LINE and ends with status 1 if there is one. Not checked are
data, files that a script writes, Markdown's tables and headings, and a line that is one word, for example a
long link.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIMIT = 110
DATA = {".json", ".jsonl", ".html", ".csv"}
GENERATED = (
    "docs/studies/",
    "docs/assets/",
    "docs/config-reference.md",
    "docs/style-table.md",
    "tests/golden/",
)


def files_of(folder: Path) -> list[Path]:
    """The files that git knows or would add, relative to the folder."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(name) for name in sorted(set(names)) if name and (folder / name).is_file()]


def is_checked(file: Path) -> bool:
    return file.suffix not in DATA and not file.as_posix().startswith(GENERATED)


def can_be_broken(line: str, file: Path) -> bool:
    if file.suffix == ".md" and line.lstrip(" >").startswith(("|", "#")):
        return False
    words = line.split()
    if words and words[0] in {"-", "*", "#", "//", ">"}:
        words = words[1:]
    return len(words) > 1


def long_lines(folder: Path, file: Path) -> list[tuple[int, int]]:
    """Number and length of each line of the file that is too long and could be broken."""
    try:
        text = (folder / file).read_text(encoding="utf-8")
    except UnicodeDecodeError:  # an image or an archive
        return []
    lines = enumerate(text.splitlines(), start=1)
    return [(number, len(line)) for number, line in lines if len(line) > LIMIT and can_be_broken(line, file)]


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        print(f"columns: {folder} is not a git checkout, so its files are not known and not checked")
        return 0
    found = 0
    for file in filter(is_checked, files_of(folder)):
        for number, length in long_lines(folder, file):
            print(f"{file}:{number}: {length} columns, {LIMIT} are allowed")
            found += 1
    return int(found > 0)


if __name__ == "__main__":
    raise SystemExit(main())
