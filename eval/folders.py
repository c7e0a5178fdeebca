"""The one reader of evaluation folders: results.json, predictions.jsonl and catalogue.jsonl.

`python -m eval.run` writes these folders. results.json says in `format` which names it uses:

    format   how items are scored   what predictions depend on   training objective
    2        scoring                scoring_key                  objective (null where it is not known)
    1        objective              scoring                      (only in config)

Folders of format 1, which has no key `format`, are translated while they are read, and one line says so.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdrt_ds.data.catalogue import CatalogueEntry
from gdrt_ds.errors import UserError

FORMAT = 2
"""The format that `eval.run` writes."""

RESULTS = "results.json"
PREDICTIONS = "predictions.jsonl"
CATALOGUE = "catalogue.jsonl"
BASE = "base"  # what stands for the objective of a base model, which nothing tuned
NOT_KNOWN = "?"


@dataclass
class Evaluation:
    """One evaluation folder whose results.json has been read.

    Attributes:
        folder: where it is.
        label: the shortest name that tells it from the other folders of a comparison.
        results: the content of results.json under its current names.
    """

    folder: Path
    label: str
    results: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The config of the run that was evaluated; empty if the folder does not say."""
        return self.results.get("config") or {}

    def setting(self, dotted: str) -> str:
        """A setting of the run's config as text, e.g. of "train.seed"; `?` if the folder does not say."""
        node: Any = self.config
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return NOT_KNOWN if node is None else str(node)

    @property
    def objective(self) -> str:
        """What the model was trained with: an objective, `base` for a run's base model, `?` if not known.

        The config does not say it. That of a base model names the objective of its run, and that of a model
        trained elsewhere holds defaults.
        """
        trained = self.results.get("objective")
        if trained is not None:
            return str(trained)
        return BASE if str(self.results.get("name")).endswith("(base)") else NOT_KNOWN

    def audit(self, name: str) -> Mapping[str, Any]:
        """The result of one audit; empty if it did not run."""
        return (self.results.get("audits") or {}).get(name) or {}

    def predictions(self) -> list[dict[str, Any]]:
        """One object per test sample, in the order of the file."""
        return read_json_lines(self.folder / PREDICTIONS)

    def lists(self) -> list[list[str]]:
        """The item ids of every recommended list, best first."""
        return [row["top_ids"] for row in self.predictions()]

    def catalogue(self) -> list[dict[str, Any]]:
        """One object per catalogue entry, in the catalogue's order."""
        return read_json_lines(self.folder / CATALOGUE)

    def entries(self) -> list[CatalogueEntry]:
        """The catalogue as objects, which is what the metrics take."""
        return [
            CatalogueEntry(
                row["item_id"],
                row.get("merged_ids") or [],
                row.get("text", ""),
                row["train_count"],
                row.get("provider"),
                row.get("groups") or {},
                row.get("name"),
            )
            for row in self.catalogue()
        ]

    def history_counts(self) -> dict[str, float] | None:
        """Item id -> its occurrences in the histories of the training data; None if they are not saved."""
        rows = self.catalogue()
        if not all("history_count" in row for row in rows):
            return None
        return {row["item_id"]: row["history_count"] for row in rows}


def open_evaluation(folder: str | Path, label: str | None = None) -> Evaluation:
    """Reads one evaluation folder.

    Args:
        label: its name in tables; by default the name of the run.
    Raises:
        UserError: results.json is missing or damaged.
    """
    folder = Path(folder)
    return Evaluation(folder, label or run_name(folder), read_results(folder))


def load_evaluations(paths: Sequence[str | Path], at_least: int) -> list[Evaluation]:
    """Reads several evaluation folders, or run folders (see `find_evaluation`).

    A folder that is given twice counts once.

    Raises:
        UserError: there are fewer than `at_least`, one is not evaluated or cannot be read, or they are of
            different splits.
    """
    folders = list(dict.fromkeys(find_evaluation(Path(path)).resolve() for path in paths))
    if len(folders) < at_least:
        raise UserError(
            f"{len(folders)} folder(s) given, at least {at_least} are compared",
            "give --runs DIR DIR ... of evaluated runs",
        )
    found = [
        open_evaluation(folder, label) for folder, label in zip(folders, labels_of(folders), strict=True)
    ]
    splits = _values(found, "split")
    if len(set(splits.values())) > 1:
        named = ", ".join(f"{label} {split}" for label, split in splits.items())
        raise UserError(
            f"the evaluations are of different splits: {named}",
            "give evaluation folders of one split, e.g. RUN/eval/test-renormalised, instead of run folders",
        )
    return found


def unlike(evaluations: Sequence[Evaluation]) -> list[str]:
    """Sentences on what a reader has to know of evaluations that are set side by side.

    They name limited evaluations, and differences in how or on how many samples they were scored.
    """
    notes = []
    limits = {run.label: run.results["limit"] for run in evaluations if run.results.get("limit")}
    if limits:
        named = ", ".join(f"{label} to {limit} samples" for label, limit in limits.items())
        notes.append(f"Not a result: limited evaluations (--limit): {named}.")
    names = {"scoring": "scoring", "mode": "mode"}
    if len({run.setting("data.path") for run in evaluations}) == 1:
        names["num_samples"] = "number of samples"  # other data have other samples anyway
    for key, name in names.items():
        values = _values(evaluations, key)
        if len(set(values.values())) > 1:
            named = ", ".join(f"{label} {value}" for label, value in values.items())
            notes.append(f"The evaluations differ in their {name}: {named}.")
    return notes


def _values(evaluations: Sequence[Evaluation], key: str) -> dict[str, Any]:
    """Label -> a value of results.json, of the evaluations that have it."""
    found = {run.label: run.results.get(key) for run in evaluations}
    return {label: value for label, value in found.items() if value is not None}


def is_evaluation(folder: Path) -> bool:
    """Whether an evaluation ended there: results.json is the last file that is written."""
    return (folder / RESULTS).is_file()


def find_evaluation(folder: Path) -> Path:
    """The folder itself if it is an evaluation folder, else the newest evaluation of a run's own model.

    Evaluations with a limit are taken only where there is no other. Those of a run's base model, whose
    folder names end in `-base`, are left out.

    Raises:
        UserError: nothing was evaluated there.
    """
    if is_evaluation(folder):
        return folder
    written = sorted((folder / "eval").glob(f"*/{RESULTS}"), key=lambda path: path.stat().st_mtime)
    own = [path.parent for path in written if not path.parent.name.endswith("-base")]
    if not own:
        raise UserError(
            f"{folder} holds no evaluation (no {RESULTS})",
            f"evaluate it first: python -m eval.run --run {folder}",
        )
    for newest in reversed(own):
        if not read_results(newest).get("limit"):
            return newest
    return own[-1]


# -- files -----------------------------------------------------------------------------------------
def read_results(folder: str | Path) -> dict[str, Any]:
    """The content of results.json under its current names, whichever version wrote it.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(folder) / RESULTS
    try:
        return current_results(json.loads(_text(path)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON ({error})", "run the evaluation again; the file is damaged"
        ) from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file.

    Raises:
        UserError: the file is missing or damaged; names the line.
    """
    rows = []
    # Titles may hold characters that `splitlines` takes for the end of a line.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number} is not JSON ({error.msg})",
                "run the evaluation again; the file is damaged",
            ) from None
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason})", _folders_meant(path.parent)) from None


def _folders_meant(folder: Path) -> str:
    """The fix for a folder that is no evaluation: those that stand beneath it, as in a run folder."""
    if is_evaluation(folder):
        return "give folders that `python -m eval.run` has written"
    beneath = sorted(str(path.parent) for path in folder.glob(f"eval/*/{RESULTS}"))
    beneath += sorted(str(path.parent) for path in folder.glob(f"*/{RESULTS}"))
    if beneath:
        return f"give an evaluation folder; beneath it there are {', '.join(beneath[:6])}"
    if (folder / "config.yaml").is_file():
        return f"this run is not evaluated yet: python -m eval.run --run {folder}"
    return "give folders that `python -m eval.run` has written"


# -- names of earlier versions ---------------------------------------------------------------------
def current_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """results.json under its current names; see the table at the top of this file."""
    if results.get("format", 1) >= FORMAT:
        return dict(results)
    _say_once("results.json of an earlier version is read: its `objective` is what is called `scoring` now")
    key = current_scoring_key(results.get("scoring") or {})
    return {
        **results,
        "format": FORMAT,
        "scoring": results.get("objective"),
        "scoring_key": key,
        "objective": _trained_objective(results, key),
    }


def current_scoring_key(key: Mapping[str, Any]) -> dict[str, Any]:
    """scoring.json under its current names: `objective` became `scoring`. The order of the keys stays."""
    if "scoring" in key:
        return dict(key)
    return {("scoring" if name == "objective" else name): value for name, value in key.items()}


def _trained_objective(results: Mapping[str, Any], key: Mapping[str, Any]) -> str | None:
    """The training objective as format 1 knows it.

    A base model has no adapter. An evaluation of a model trained elsewhere holds a config of defaults, whose
    objective says nothing; its name is not that of the config's run.
    """
    config = results.get("config") or {}
    folder = (config.get("run") or {}).get("dir")
    own = folder is not None and Path(folder).name == results.get("name")
    return config.get("objective") if own and key.get("adapter") else None


@functools.cache
def _say_once(line: str) -> None:
    """Prints a line the first time that it is asked for."""
    print(line, flush=True)


# -- labels ----------------------------------------------------------------------------------------
def run_name(folder: Path) -> str:
    """The run that a folder evaluates: `sft` for runs/sft/eval/test-full, else the folder's own name."""
    folder = Path(os.path.abspath(folder))
    return folder.parents[1].name if folder.parent.name == "eval" else folder.name


def labels_of(folders: Sequence[str | Path]) -> list[str]:
    """A short name for each folder: the runs' names if they differ, else the ends of the paths that differ.

    What all names share is left out. runs/a/eval and runs/b/eval become a and b; planted-sft-eval and
    planted-gdrt-eval become sft and gdrt.

    Raises:
        UserError: a folder is given twice.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(paths)) != len(paths):
        raise UserError("a folder is given twice", "give each evaluation folder once")
    if len(paths) == 1:
        return [run_name(paths[0])]
    names = [run_name(path) for path in paths]
    if len(set(names)) < len(names):
        names = _distinct_endings([path.parts for path in paths])
    return _without_shared_words(names)


def _distinct_endings(parts: list[tuple[str, ...]]) -> list[str]:
    """The shortest endings of distinct paths that differ, without a last part that all of them share."""
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    endings = [path[-depth:] for path in parts]
    while min(map(len, endings)) > 1 and len({ending[-1] for ending in endings}) == 1:
        shorter = [ending[:-1] for ending in endings]
        if len(set(shorter)) < len(shorter):
            break
        endings = shorter
    return ["/".join(ending) for ending in endings]


def _without_shared_words(names: list[str]) -> list[str]:
    """Leaves out words that all names end or begin with, while every name keeps a word."""
    words = [name.split("-") for name in names]
    while min(map(len, words)) > 1 and len({name[-1] for name in words}) == 1:
        words = [name[:-1] for name in words]
    while min(map(len, words)) > 1 and len({name[0] for name in words}) == 1:
        words = [name[1:] for name in words]
    return ["-".join(name) for name in words]
