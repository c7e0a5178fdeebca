"""The layer check of `make lint` notices an import that runs the wrong way, and a circle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter comes with `make install` (extra: dev)")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of both packages and the contracts, in which a test may plant an import."""
    folder = tmp_path_factory.mktemp("house")
    for name in ("gdrt_ds", "eval"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def check(folder: Path) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def planted(folder: Path, file: str, line: str) -> subprocess.CompletedProcess:
    path = folder / file
    before = path.read_text(encoding="utf-8")
    path.write_text(f"{before}\n\ndef _planted():\n    {line}\n", encoding="utf-8")
    try:
        return check(folder)
    finally:
        path.write_text(before, encoding="utf-8")


def test_the_layers_hold(house):
    done = check(house)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_import_against_the_order_of_the_rooms_is_refused(house):
    done = planted(house, "gdrt_ds/data/trie.py", "import gdrt_ds.training.step")
    assert done.returncode == 1 and "rooms in the order of the data BROKEN" in done.stdout


def test_the_package_may_not_import_the_evaluation(house):
    done = planted(house, "gdrt_ds/training/loop.py", "import eval.metrics")
    assert done.returncode == 1 and "gdrt_ds never imports eval BROKEN" in done.stdout


def test_a_circle_inside_a_room_is_refused(house):
    done = planted(house, "gdrt_ds/data/corpus.py", "import gdrt_ds.data.catalogue")
    assert done.returncode == 1 and "no circles BROKEN" in done.stdout
