"""The exactness table: the same global batch on every number of ranks, accumulation and ZeRO stage gives
the same training.

    make test-exactness                                   all cells, minutes; the table of docs/method.md
    python tests/distributed/exactness.py --subset        what `make test` runs
    python tests/distributed/exactness.py --only growing  the cells with such a name
    python tests/distributed/exactness.py --json          one JSON line per cell

Every cell takes five SGD steps in float32 (dropout 0, seeded adapter) and is compared to plain torch in
float64 on one process: group losses and weights within 1e-6, weights bitwise equal on all ranks, every
gradient tensor of three steps (one of them with a rank that has no tokens) and every parameter after the
fifth within 1e-5 of its norm. One launch per world size covers its cells.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from gdrt_ds.runtime import quiet_libraries
from tests.distributed.exact_cells import Cell, run_cell, tiny_model
from tests.distributed.plain_reference import run_reference
from tests.distributed.ranks import run_ranks

LOSS_TOLERANCE, TENSOR_TOLERANCE = 1e-6, 1e-5
DROPOUT = (("model.lora.dropout", 0.3),)

VARIANTS = [
    dict(estimate="ema"),
    dict(base="none"),
    dict(base="none", estimate="ema", packing="packed"),
    dict(packing="none"),
    dict(packing="packed"),
    dict(packing="prefix_tree"),
    dict(packing="prefix_tree", estimate="ema"),
    dict(packing="prefix_tree", objective="cvar", options=(("dro.alpha", 0.3),)),
    dict(packing="prefix_tree", objective="gdrt+msl"),
    dict(packing="prefix_tree", objective="cft"),
    dict(packing="prefix_tree", objective="sft"),
    dict(packing="prefix_tree", objective="group_dro"),
    dict(packing="prefix_tree", objective="focal"),
    dict(packing="prefix_tree", objective="msl"),
    dict(packing="prefix_tree", objective="igd"),
    dict(packing="prefix_tree", objective="reweight"),
    dict(packing="prefix_tree", objective="sft_go"),
    dict(packing="prefix_tree", growing="worded"),
    dict(packing="prefix_tree", growing="worded", options=DROPOUT),
    dict(packing="prefix_tree", growing="list", estimate="ema", resumed=True),
    dict(tied=True),
    dict(train_head=True),
    dict(train_head=True, tied=True, base="none"),
    dict(checkpointing=True),
    dict(excess=True),
    dict(checkpointing=True, train_head=True, packing="none"),
    dict(options=(("dro.prior", "uniform"),)),
    dict(starve=False, estimate="ema"),
    dict(options=DROPOUT),
    dict(packing="none", options=DROPOUT),
    dict(checkpointing=True, objective="cft", options=DROPOUT),
    dict(objective="sft"),
    dict(objective="group_dro"),
    dict(objective="group_dro", estimate="ema"),
    dict(objective="cvar", options=(("dro.alpha", 0.3),)),
    dict(objective="cvar", options=(("dro.alpha", 0.3), ("dro.cvar_over", "groups"))),
    dict(objective="focal"),
    dict(objective="msl"),
    dict(objective="gdrt+msl"),
    dict(objective="cft"),
    dict(objective="igd"),
    dict(objective="reweight"),
    dict(objective="bear", options=(("options.bear_k", 3), ("options.bear_lambda", 4.0))),
    dict(objective="bear", packing="prefix_tree", options=(("options.bear_favours", "at_risk"),)),
    dict(objective="bear", train_head=True),
    dict(objective="sft_go"),
    dict(objective="sft_go", estimate="ema"),
    dict(rows=True),
    dict(rows=True, objective="group_dro", packing="prefix_tree"),
    dict(rows=True, objective="cvar", options=(("dro.alpha", 0.3),)),
    dict(rows=True, objective="cft"),
]


@dataclass
class Row:
    """Largest errors of one cell; `ok` = all within tolerance and q bitwise equal on all ranks."""

    world: int
    accumulation: int
    stage: int
    name: str
    loss: float
    weight: float
    objective: float
    gradient: float
    parameter: float
    bitwise: bool
    ok: bool
    seconds: float


def all_cells() -> list[tuple[int, Cell]]:
    main = [
        (world, Cell(accumulation, stage))
        for world in (1, 2, 3, 4)
        for accumulation in (1, 2, 4)
        for stage in (0, 1, 2, 3)
    ]
    variants = [
        (world, Cell(accumulation, stage, **v))
        for world, accumulation, stage in ((2, 2, 3), (3, 1, 2))
        for v in VARIANTS
    ]
    return main + variants


def subset_cells() -> list[tuple[int, Cell]]:
    """Every stage, accumulation and world at least once, and the variants that take another way through the
    code.
    """
    main = [
        (1, Cell(2, 3)),
        (2, Cell(1, 0)),
        (2, Cell(2, 1)),
        (2, Cell(4, 2)),
        (2, Cell(4, 3)),
        (3, Cell(2, 3)),
        (4, Cell(1, 3)),
    ]
    chosen = [
        dict(estimate="ema", packing="prefix_tree"),
        dict(train_head=True, tied=True, base="none"),
        dict(checkpointing=True, train_head=True, packing="none"),
        dict(objective="group_dro"),
        dict(objective="cvar", options=(("dro.alpha", 0.3),)),
        dict(objective="gdrt+msl"),
        dict(objective="cft"),
        dict(rows=True, objective="group_dro", packing="prefix_tree"),
        dict(packing="prefix_tree", growing="list", estimate="ema", resumed=True, options=DROPOUT),
        dict(objective="bear", options=(("options.bear_k", 3), ("options.bear_lambda", 4.0))),
    ]
    return main + [(2, Cell(2, 3, **v)) for v in chosen]


def _cells_on_rank(rank: int, world: int, cells: list[Cell], folder: Path):
    results = []
    for cell in cells:
        started = time.perf_counter()
        results.append((run_cell(cell, rank, world, folder), time.perf_counter() - started))
    return results


def _references(rank: int, world: int, cells: list[Cell], folder: Path):
    return [run_reference(cell, folder) for cell in cells]


def relative_norm(found: dict, wanted: dict) -> float:
    """Largest |found - wanted| / |wanted| over tensors; infinite when a name is missing."""
    if set(found) != set(wanted):
        return float("inf")
    return max(float(np.linalg.norm(found[n] - w) / np.linalg.norm(w)) for n, w in wanted.items())


def compare(world: int, cell: Cell, wanted, ranks: list, seconds: float) -> Row:
    """ranks: the CellResult of every rank."""

    def furthest(name):
        pairs = [(getattr(r, name), getattr(wanted, name)) for r in ranks]
        if any(not np.array_equal(np.isnan(a), np.isnan(b)) for a, b in pairs):
            return float("inf")
        return max(float(np.nanmax(np.abs(np.array(a) - np.array(b)))) for a, b in pairs)

    loss, weight = (
        max(furthest("group_loss"), furthest("loss")),
        max(furthest("group_weight"), furthest("group_count")),
    )
    gradient = max(relative_norm(f, w) for f, w in zip(ranks[0].gradients, wanted.gradients, strict=True))
    parameter = max(relative_norm(r.parameters, wanted.parameters) for r in ranks)
    bitwise = (
        len({np.array(r.group_weight).tobytes() for r in ranks}) == 1
        and len({np.array(r.group_loss).tobytes() for r in ranks}) == 1
    )
    bitwise = bitwise and len({b"".join(r.state[k].tobytes() for k in sorted(r.state)) for r in ranks}) == 1
    objective = furthest("objective")
    ok = (
        bitwise
        and max(loss, weight, objective) <= LOSS_TOLERANCE
        and max(gradient, parameter) <= TENSOR_TOLERANCE
    )
    return Row(
        world,
        cell.accumulation,
        cell.stage,
        cell.name(),
        loss,
        weight,
        objective,
        gradient,
        parameter,
        bitwise,
        ok,
        seconds,
    )


def run_table(cells: list[tuple[int, Cell]], folder: Path, report=lambda row: None) -> list[Row]:
    for tied in (False, True):
        tiny_model(folder, tied)
    keys = list(dict.fromkeys(cell.reference_key() for _, cell in cells))
    wanted = dict(zip(keys, run_ranks(1, _references, keys, folder, timeout_s=600)[0]))
    rows = []
    for world in sorted({world for world, _ in cells}):
        mine = [cell for w, cell in cells if w == world]
        outputs = run_ranks(world, _cells_on_rank, mine, folder, timeout_s=1500)
        for index, cell in enumerate(mine):
            ranks, seconds = [output[index][0] for output in outputs], outputs[0][index][1]
            rows.append(compare(world, cell, wanted[cell.reference_key()], ranks, seconds))
            report(rows[-1])
    return rows


def markdown(rows: list[Row]) -> str:
    """The two tables of the docs: the grid with the default choices, and the variants."""
    default = Cell().name()
    lines = [
        "| ranks | accumulation | largest of ZeRO stages 0, 1, 2, 3: group loss | weight q | gradient | "
        "parameters after 5 steps | q bitwise equal |",
        "|---|---|---|---|---|---|---|",
    ]
    grid = [r for r in rows if r.name == default]
    for world, accumulation in dict.fromkeys((r.world, r.accumulation) for r in grid):
        lines.append(
            _line(
                [f"{world}", f"{accumulation}"],
                [r for r in grid if (r.world, r.accumulation) == (world, accumulation)],
            )
        )
    lines += [
        "",
        "| variant (objective, estimate, base, packing, ...) | group loss | weight q | gradient | "
        "parameters | q bitwise equal |",
        "|---|---|---|---|---|---|",
    ]
    rest = [r for r in rows if r.name != default]
    lines += [
        _line([name], [r for r in rest if r.name == name]) for name in dict.fromkeys(r.name for r in rest)
    ]
    return "\n".join(lines)


def _line(first: list[str], rows: list[Row]) -> str:
    worst = [
        f"{max(getattr(r, field) for r in rows):.1e}" for field in ("loss", "weight", "gradient", "parameter")
    ]
    return "| " + " | ".join([*first, *worst, "yes" if all(r.bitwise for r in rows) else "NO"]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subset", action="store_true", help="the cells of make test")
    parser.add_argument("--only", help="the cells in whose name this regular expression finds something")
    parser.add_argument("--json", action="store_true", help="one JSON line per cell instead of the tables")
    parser.add_argument("--output", type=Path, help="also write the rows as a JSON list")
    arguments = parser.parse_args()
    quiet_libraries()
    warnings.simplefilter("ignore")

    started = time.perf_counter()

    def report(row: Row) -> None:
        if arguments.json:
            print(json.dumps(asdict(row)), flush=True)
        elif not row.ok:
            print(f"FAILED {row}", flush=True)

    cells = subset_cells() if arguments.subset else all_cells()
    if arguments.only is not None:
        cells = [(world, cell) for world, cell in cells if re.search(arguments.only, cell.name())]
    with tempfile.TemporaryDirectory() as folder:
        rows = run_table(cells, Path(folder), report)
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(row) for row in rows]))
    failed = [row for row in rows if not row.ok]
    if not arguments.json:
        print(markdown(rows))
        print(f"\n{len(rows)} cells, {len(failed)} failed, {time.perf_counter() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
