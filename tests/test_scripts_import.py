"""What scripts outside the packages take from them exists: benchmarks, examples, Slurm's Python files."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path for folder in ("benchmarks", "docs", "slurm", "tests") for path in (ROOT / folder).rglob("*.py")
)


def imports_of(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import from the two packages, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            if node.module.split(".")[0] in ("gdrt_ds", "eval"):
                found += [(node.module, alias.name) for alias in node.names]
    return found


def missing(module: str, name: str) -> bool:
    """Whether `from module import name` would fail."""
    if module == "gdrt_ds.loss.kernels":
        return False  # needs triton, which CPU builds of torch lack
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError:
        return True
    if hasattr(loaded, name):
        return False
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return True
    return False


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_that_a_script_imports_exists(path):
    assert [pair for pair in imports_of(path) if missing(*pair)] == []


def test_a_module_that_has_moved_is_found():
    assert missing("gdrt_ds.training.trainer", "choose_packing")
    assert missing("gdrt_ds.training.run", "choose_packing")
    assert not missing("gdrt_ds.training", "run")
