"""Evaluation folders, for audits over several runs: where they are, and what results.json, predictions.jsonl and catalogue.jsonl say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdrt_ds.errors import UserError


@dataclass
class Evaluation:
    """One evaluation folder. `label`: its shortest name that tells it from the others."""

    folder: Path
    label: str
    results: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.results.get("config") or {}

    def setting(self, dotted: str) -> str:
        """A setting of the run's config as text, `?` if the folder does not say."""
        node: Any = self.config
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return "?" if node is None else str(node)

    def lists(self) -> list[list[str]]:
        """Item ids of every list, best first."""
        return [row["top_ids"] for row in _lines(self.folder / "predictions.jsonl")]

    def catalogue(self) -> list[dict[str, Any]]:
        return _lines(self.folder / "catalogue.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error})", "evaluate the run again: python -m eval.run --run RUN_DIR"
        ) from None


def find_evaluation(folder: Path) -> Path:
    """The folder itself, or the newest evaluation under RUN/eval of its own model (not of its base).

    Raises:
        UserError: nothing was evaluated there.
    """
    if (folder / "results.json").is_file():
        return folder
    found = [
        p.parent
        for p in sorted((folder / "eval").glob("*/results.json"), key=lambda p: p.stat().st_mtime)
        if not p.parent.name.endswith("-base")
    ]
    if not found:
        raise UserError(
            f"{folder} holds no evaluation (no results.json)",
            f"evaluate it first: python -m eval.run --run {folder}",
        )
    return found[-1]


def load_evaluations(paths: Sequence[str | Path], at_least: int) -> list[Evaluation]:
    """Reads evaluation (or run) folders.

    Raises:
        UserError: too few, not evaluated, or unreadable.
    """
    folders = list(dict.fromkeys(find_evaluation(Path(p)).resolve() for p in paths))
    if len(folders) < at_least:
        raise UserError(
            f"{len(folders)} folder(s) given, this audit compares at least {at_least}",
            "give --runs DIR DIR ... of evaluated runs",
        )
    found = []
    for folder, label in zip(folders, _labels(folders)):
        try:
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder}/results.json: cannot be read ({error})", "evaluate the run again"
            ) from None
        found.append(Evaluation(folder, label, results))
    return found


def _labels(folders: list[Path]) -> list[str]:
    """Run names where they are distinct, else as many path parts as it takes."""
    parts = [[p for p in f.parts if p != "eval"] for f in folders]
    runs = [f.parents[1].name if f.parent.name == "eval" else f.name for f in folders]
    if len(set(runs)) == len(runs):
        return runs
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-count:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(f) for f in folders]


def needs_runs(context, at_least: int) -> tuple[str, str] | None:
    """For Audit.lacks: whether --runs names enough folders."""
    if len(context.options.runs) >= at_least:
        return None
    return (
        f"it compares at least {at_least} runs, --runs names {len(context.options.runs)}",
        "give --runs DIR DIR ... of evaluated runs",
    )
