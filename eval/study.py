"""One page about a whole study: rows x metrics with intervals over users and seeds, differences to the baseline and the controls.

    python -m eval.study STUDY_DIR                         writes study.html, study.md, study.json into it
    python -m eval.study --evaluate RUN RUN ... [--arguments JSON]      evaluates several runs in one process (imports are paid once)
STUDY_DIR is what `python -m gdrt_ds.study` made: grid.json and runs/. Cells that are not evaluated yet are named on the page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.compare import Run, check_same, load_run
from eval.intervals import Comparison, Resampled, compare_family, interval, resample
from eval.metrics import table
from eval.metrics.inputs import build_inputs
from eval.seeds import combine_all, t_interval
from gdrt_ds.errors import UserError

METRICS = (
    "nll",
    "nll_worst_relevance_group",
    "nll_calibrated",
    "nll_calibrated_worst_relevance_group",
    "temperature",
    "ndcg@10",
    "hr@10",
    "mrr",
    "mgu@5",
    "dgu@5",
    "coverage@10",
)
BY_LABEL = ("ndcg@10", "nll")
FAMILY = (
    "nll",
    "nll_worst_relevance_group",
    "nll_calibrated",
    "nll_calibrated_worst_relevance_group",
    "ndcg@10",
    "mgu@5",
)
# name on the page -> (audit, measure, as log2)
AUDITED = {
    "known through the history, nats": ("information", "known through the history", False),
    "known without it, nats": ("information", "known without the history", False),
    "history sensitivity, nats": ("sensitivity", "swapped history - true", False),
    "auxiliary:interaction, log2": ("language", "log2 ratio", False),
    "auxiliary:interaction, tuned / base, log2": (
        "language",
        "ratio after / before tuning",
        True,
    ),  # ratios have means only as logarithms
}


@dataclass
class Block:
    """One setting: its rows over the same users, each over its own seeds."""

    setting: str
    seeds: dict[str, list[int]]  # of each row
    rows: dict[str, dict[str, Resampled]]
    comparisons: dict[str, dict[str, dict[str, Comparison]]]  # reference row -> row -> metric
    audits: dict[str, dict[str, dict[int, float]]]  # figure -> row -> seed
    floors: dict[str, dict[str, float | None]]
    num_users: int
    num_items: int
    notes: list[str]


# -- evaluating --------------------------------------------------------------------------------------------------------
def evaluate_runs(runs: Sequence[str], arguments: Sequence[str]) -> int:
    """`eval.run` on one run after the other in this process; one that fails does not end the others. Returns the failures."""
    from eval.run import main as evaluate

    failures = 0
    for run in map(Path, runs):
        log = run / "logs" / "evaluation.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        status: object = 0
        with (
            open(log, "w", encoding="utf-8") as stream,
            contextlib.redirect_stdout(stream),
            contextlib.redirect_stderr(stream),
        ):
            try:
                evaluate(["--run", str(run), "--output", str(run / "eval" / "test-renormalised"), *arguments])
            except SystemExit as end:
                status = end.code
        failures += bool(status)
        print(
            f"{run.name}: {'evaluated' if not status else f'evaluation failed with status {status} (log: {log})'}",
            flush=True,
        )
    return failures


# -- reading -----------------------------------------------------------------------------------------------------------
def read_grid(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """(study, evaluated cells, names of the others)."""
    try:
        grid = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}/grid.json cannot be read ({error})", "give the folder of `python -m gdrt_ds.study`"
        ) from None
    done = [c for c in grid["cells"] if (folder / c["evaluation"] / "results.json").is_file()]
    if not done:
        raise UserError(
            f"{folder}: no cell of the study is evaluated yet",
            "python -m gdrt_ds.study FILE trains and evaluates them",
        )
    names = {c["name"] for c in done}
    return grid["study"], done, [c["name"] for c in grid["cells"] if c["name"] not in names]


def statistics_of(run: Run, label: str | None, num_bootstrap: int) -> dict[str, Resampled]:
    """Metrics of a run over its users, and those of BY_LABEL for every value of a sample label: `ndcg@10 kind=history`."""
    found, _, _ = table.statistics(run.inputs, (5, 10))
    samples = resample({n: found[n] for n in METRICS if n in found}, run.inputs.user_of_sample, num_bootstrap)
    values = (
        sorted({str(p["labels"][label]) for p in run.predictions if label in (p.get("labels") or {})})
        if label
        else []
    )
    for value in values:
        part = [p for p in run.predictions if str((p.get("labels") or {}).get(label)) == value]
        inputs = build_inputs(part, run.entries, run.history_counts)
        own, _, _ = table.statistics(inputs, (10,))
        samples |= {
            f"{n} {label}={value}": s
            for n, s in resample(
                {n: own[n] for n in BY_LABEL if n in own}, inputs.user_of_sample, num_bootstrap
            ).items()
        }
    return samples


def with_groups_of(run: Run, other: Run) -> Run:
    """The run with the relevance groups of another: a worst group must mean the same targets in every row."""
    groups = {str(p["sample_id"]): p.get("relevance_group") for p in other.predictions}
    predictions = [{**p, "relevance_group": groups.get(str(p["sample_id"]))} for p in run.predictions]
    return Run(
        run.label,
        run.folder,
        run.results,
        predictions,
        run.entries,
        run.history_counts,
        build_inputs(predictions, run.entries, run.history_counts),
    )


def direction(name: str) -> bool | None:
    row = table.row_of(name.split(" ")[0])
    return row.higher_is_better if row else None


def build_block(
    study: Mapping[str, Any], folder: Path, setting: str, cells: list[dict[str, Any]], num_bootstrap: int
) -> Block:
    """Rows of one setting, each over its own seeds; two rows are compared over the seeds that both have."""
    runs: dict[str, dict[int, Run]] = {}
    for cell in sorted(cells, key=lambda c: c["seed"]):
        runs.setdefault(cell["row"], {})[cell["seed"]] = load_run(
            folder / cell["evaluation"], f"{cell['row']} seed {cell['seed']}"
        )
    runs = {row: runs[row] for row in study["rows"] if row in runs}
    base = study["baseline"] if study["baseline"] in runs else next(iter(runs))
    seeds, notes = sorted({seed for found in runs.values() for seed in found}), []
    for seed in seeds:
        beside = [found[seed] for found in runs.values() if seed in found]
        notes += check_same([runs[base].get(seed, beside[0]), *beside])
    if not _same_samples([next(found[seed] for found in runs.values() if seed in found) for seed in seeds]):
        notes.append(
            f"{setting}: seeds differ in their test users, so users are drawn by their place in the test split"
        )
    lonely = [f"{row} {seed}" for row, found in runs.items() for seed in found if seed not in runs[base]]
    if lonely:
        notes.append(
            f"{setting}: without a run of {base} of the same seed: {', '.join(lonely)}; their worst relevance group is of their own groups"
        )
    statistics = {
        row: {
            seed: statistics_of(
                with_groups_of(run, runs[base].get(seed, run)), study.get("label"), num_bootstrap
            )
            for seed, run in found.items()
        }
        for row, found in runs.items()
    }
    first = next(iter(runs[base].values()))
    users = len(first.inputs.user_ids)
    comparisons: dict[str, dict[str, dict[str, Comparison]]] = {}
    for reference in [base, *(c for c in study["controls"] if c in runs)]:
        others = [
            row
            for row in runs
            if row != reference and (reference == base or row not in (base, *study["controls"]))
        ]
        shared = {row: [seed for seed in runs[row] if seed in runs[reference]] for row in others}
        comparisons[reference] = {
            row: _compare(statistics, reference, row, both, users) for row, both in shared.items() if both
        }
    audits = {
        title: {
            row: {seed: _audit(run, *where) for seed, run in found.items()} for row, found in runs.items()
        }
        for title, where in AUDITED.items()
    }
    audits = {
        title: found
        for title, found in audits.items()
        if all(v is not None for values in found.values() for v in values.values())
    }
    floors = {
        name: {m: (metrics.get(m) or {}).get("value") for m in METRICS}
        for name, metrics in first.results.get("floors", {}).items()
        if name != "targets"
    }
    return Block(
        setting,
        {row: list(found) for row, found in runs.items()},
        {row: combine_all(list(found.values())) for row, found in statistics.items()},
        comparisons,
        audits,
        floors,
        users,
        first.inputs.num_items,
        list(dict.fromkeys(notes)),
    )


def _compare(
    statistics: Mapping[str, Mapping[int, dict[str, Resampled]]],
    reference: str,
    row: str,
    seeds: list[int],
    users: int,
) -> dict[str, Comparison]:
    before, after = (combine_all([statistics[name][seed] for seed in seeds]) for name in (reference, row))
    names = [n for n in before if n in after]
    family = [n for n in names if n in FAMILY or n.startswith("ndcg@10 ")]
    return compare_family(
        {n: before[n] for n in names},
        {n: after[n] for n in names},
        users,
        family,
        {n: direction(n) for n in names},
    )


def _cells_beside(
    study: Mapping[str, Any], cells: list[dict[str, Any]], setting: str
) -> list[dict[str, Any]]:
    """The cells of a setting and those that it borrows (gdrt_ds/studies/grid.py), for its own seeds."""
    mine = [c for c in cells if c["setting"] == setting]
    part = study["settings"][setting] if isinstance(study["settings"], Mapping) else {}
    seeds = {c["seed"] for c in mine}
    return mine + [
        c
        for lender, rows in (part.get("borrows") or {}).items()
        for c in cells
        if c["setting"] == lender and c["row"] in rows and c["seed"] in seeds
    ]


def _same_samples(runs: Sequence[Run]) -> bool:
    keys = [[(p["sample_id"], p["user_id"], p["target_id"]) for p in run.predictions] for run in runs]
    if any(len(k) != len(keys[0]) for k in keys):
        raise UserError(
            "the seeds of a study have test splits of different sizes",
            "give all cells the same data.limit_test or data.planted.num_test",
        )
    return all(k == keys[0] for k in keys)


def _audit(run: Run, audit: str, measure: str, as_log2: bool) -> float | None:
    value = (
        (((run.results.get("audits") or {}).get(audit) or {}).get("measures") or {})
        .get(measure, {})
        .get("value")
    )
    return math.log2(value) if as_log2 and value is not None else value


def load_blocks(
    folder: Path, num_bootstrap: int
) -> tuple[dict[str, Any], list[Block], list[str], dict[str, Any]]:
    """(study, blocks in the order of its settings, cells without an evaluation, totals over the runs)."""
    study, cells, absent = read_grid(folder)
    blocks = []
    for setting in study["settings"]:
        mine = _cells_beside(study, cells, setting)
        if mine:
            blocks.append(build_block(study, folder, setting, mine, num_bootstrap))
    summaries = [json.loads((folder / c["run"] / "summary.json").read_text(encoding="utf-8")) for c in cells]
    totals = {
        "cells": len(cells),
        "train_seconds": round(sum(s.get("seconds", 0) for s in summaries)),
        "devices": sorted({s.get("device", "?") for s in summaries}),
        "worlds": sorted({s.get("world", 1) for s in summaries}),
        "git": sorted({str(s.get("git_hash"))[:12] for s in summaries}),
        "steps": sorted({s.get("adapter_step", s.get("step", 0)) for s in summaries}),
        "versions": summaries[0].get("versions", {}),
    }
    return study, blocks, absent, totals


def to_json(
    study: Mapping[str, Any], blocks: list[Block], absent: list[str], totals: Mapping[str, Any]
) -> dict[str, Any]:
    clean = lambda v: None if isinstance(v, float) and v != v else v  # noqa: E731
    figure = lambda s: dict(zip(("value", "ci_low", "ci_high"), map(clean, (s.value, *interval(s)))))  # noqa: E731
    found = {}
    for block in blocks:
        found[block.setting] = {
            "seeds": sorted({s for found in block.seeds.values() for s in found}),
            "seeds_of_rows": block.seeds,
            "num_users": block.num_users,
            "num_items": block.num_items,
            "rows": {row: {n: figure(s) for n, s in samples.items()} for row, samples in block.rows.items()},
            "differences": {
                ref: {
                    row: {n: {k: clean(v) for k, v in asdict(c).items()} for n, c in rows.items()}
                    for row, rows in others.items()
                }
                for ref, others in block.comparisons.items()
            },
            "audits": {
                title: {
                    row: dict(zip(("value", "ci_low", "ci_high"), map(clean, t_interval(list(v.values())))))
                    | {"seeds": list(v.values())}
                    for row, v in rows.items()
                }
                for title, rows in block.audits.items()
            },
            "floors": block.floors,
            "notes": block.notes,
        }
    return {"study": dict(study), "settings": found, "not_evaluated": absent, "totals": dict(totals)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="folder of a study")
    parser.add_argument("--evaluate", nargs="+", metavar="RUN", help="evaluate these runs and exit")
    parser.add_argument(
        "--arguments", default="[]", metavar="JSON", help="arguments of eval.run, as a JSON list"
    )
    parser.add_argument("--num-bootstrap", type=int, default=1000, metavar="B")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.evaluate:
            return min(64, evaluate_runs(chosen.evaluate, json.loads(chosen.arguments)))
        if not chosen.folder:
            raise UserError("no study is given", "python -m eval.study STUDY_DIR")
        from eval.report.html import render_html
        from eval.report.markdown import render_markdown
        from eval.study_page import build_page

        folder = Path(chosen.folder)
        study, blocks, absent, totals = load_blocks(folder, chosen.num_bootstrap)
        page = build_page(study, blocks, absent, totals)
        for name, text in (
            ("study.json", json.dumps(to_json(study, blocks, absent, totals), indent=1)),
            ("study.md", render_markdown(page)),
            ("study.html", render_html(page)),
        ):
            (folder / name).write_text(text, encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in page.sections[0].paragraphs:
        print(line.replace("**", ""))
    print(f"written: {folder}/study.html, study.md, study.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
