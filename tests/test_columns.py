"""The columns check of `make lint`: this repository passes it, and a line that is too long does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def checked_columns(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tests" / "columns.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_no_line_of_the_repository_is_over_110_columns():
    done = checked_columns(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_long_line_is_named_unless_it_cannot_be_wrapped_or_a_script_writes_it(tmp_path):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    words = "word " * 22  # 110 columns with the blank at the end
    link = "https://example.org/" + "x" * 110
    files = {
        "page.md": f"# {words} heading\n\n| {words} | cell |\n\n{words}over\n\n- {link}\n{link}\n",
        "batch.sh": f"# {words.strip()}\n# {words[:-6]}\n",
        "docs/studies/page.md": f"{words}over\n",
        "data.json": f'{{"text": "{words}"}}\n',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG" + bytes(range(128, 256)) * 4)
    done = checked_columns(tmp_path)
    named = [line.partition(" ")[0] for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert named == ["batch.sh:1:", "page.md:5:"]
