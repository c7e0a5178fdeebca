"""Measurements behind test_named_errors.py: real two-rank steps that each of the known Group DRO errors
would change.

Run as a script it measures all of them; tests/mutations.py runs one at a time on a package with that error
planted.
"""

from __future__ import annotations

import functools
import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch

from gdrt_ds.dro.groups import GroupPlan
from gdrt_ds.runtime import Runtime
from gdrt_ds.training import checkpoint, lives
from gdrt_ds.training.grouping import Grouped
from gdrt_ds.training.resuming import client_state
from gdrt_ds.training.telemetry import Telemetry
from gdrt_ds.training.validation import Best
from tests.distributed.exact_cells import (
    LR,
    NUM_GROUPS,
    Cell,
    make_config,
    make_stores,
    run_cell,
    start_runner,
    tiny_model,
)
from tests.distributed.exactness import relative_norm
from tests.distributed.plain_reference import run_reference
from tests.distributed.ranks import run_ranks

PLAIN = dict(stage=2, base="none")
FIELDS = ("group_loss", "group_weight", "group_count", "objective")


def _train(rank, world, cell, steps, folder):
    return run_cell(cell, rank, world, folder, steps)


def _reference(rank, world, cell, steps, folder):
    return run_reference(cell, folder, steps)


@functools.cache
def training(folder: Path, cell: Cell, steps: int = 2, world: int = 2) -> dict:
    """Per rank and step what the product reports, the same of plain torch, and the relative error of
    gradients.
    """
    ranks = run_ranks(world, _train, cell, steps, folder)
    wanted = run_ranks(1, _reference, cell.reference_key(), steps, folder)[0]

    def plain(result):
        return {name: np.array(getattr(result, name)[:steps]).tolist() for name in FIELDS}

    gradient = max(relative_norm(f, w) for f, w in zip(ranks[0].gradients, wanted.gradients))
    return {
        "ranks": [plain(r) for r in ranks],
        "wanted": plain(wanted),
        "gradient": gradient,
        "states": [{k: v.tolist() for k, v in r.state.items()} for r in ranks],
    }


def error_01(folder):
    return training(folder, Cell(1, **PLAIN))


def error_02(folder):
    return training(folder, Cell(1, **PLAIN))


def error_03(folder):
    return training(folder, Cell(1, **PLAIN, options=(("dro.prior", "uniform"),)), steps=5)


def error_04(folder):
    return training(folder, Cell(4, **PLAIN, objective="group_dro", options=(("dro.eta", 1.0),)), steps=1)


def error_05(folder):
    return training(folder, Cell(1, **PLAIN, estimate="ema"), steps=3)


def error_06(folder):
    return training(folder, Cell(4, **PLAIN, objective="sft"))


def error_07(folder):
    return training(folder, Cell(2, **PLAIN, estimate="ema"))


def error_08(folder):
    return training(folder, Cell(1, **PLAIN, options=(("dro.tau", 1e-3),)), steps=1)


def _log(rank, world, folder):
    """Two machines with one rank each: both have local rank 0."""
    runtime = Runtime(rank=rank, local_rank=0, world=world, local_world=1)
    config = make_config(Cell(), folder, world)
    telemetry = Telemetry(folder, config, runtime, 3, 0)
    for step in (1, 2, 3):
        telemetry.step(
            {
                "step": step,
                "loss": torch.tensor(1.0),
                "lr": 0.1,
                "grad_norm": 1.0,
                "tokens": 7,
                "objective": torch.tensor(1.0),
                "skipped": False,
                "group_loss": torch.tensor([1.0, float("nan")]),
                "group_weight": torch.tensor([1.0, float("nan")]),
                "group_count": torch.tensor([7.0, 0.0]),
            }
        )
    telemetry.close()
    return runtime.is_main


def error_09(folder):
    target = Path(folder) / "two_machines"
    target.mkdir(exist_ok=True)
    (target / "metrics.jsonl").unlink(missing_ok=True)
    tiny_model(target, False)
    mains = run_ranks(2, _log, target)
    return {
        "mains": mains,
        "steps": [json.loads(line)["step"] for line in (target / "metrics.jsonl").read_text().splitlines()],
    }


def error_10(folder):
    return training(folder, Cell(2, **PLAIN, packing="none"), steps=1)


def _resume(rank, world, cell, folder):
    """(weights of steps 3 and 4 of a straight run, the same after a checkpoint in a fresh engine)."""
    straight, resumed = start_runner(cell, rank, world, folder), None
    grouped = Grouped(GroupPlan("relevance", NUM_GROUPS), {}, None, None)
    for step in (0, 1):
        straight.run(step, LR)
    run = Path(folder) / f"resume_{cell.objective}"
    life = lives.begin_life(run) if rank == 0 else 1
    torch.distributed.barrier()
    data = make_stores()[0].fingerprint
    state = client_state(straight.config, 2, Best(), straight.state, data, grouped, {})
    checkpoint.save(straight.engine, run, 2, state, life=life, fingerprint="0" * 64)
    wanted = [straight.run(step, LR).group_weight.numpy().tolist() for step in (2, 3)]
    straight.engine.destroy()
    gc.collect()
    resumed = start_runner(cell, rank, world, folder)
    restored = checkpoint.load(resumed.engine, checkpoint.find_latest_valid(run), fingerprint="0" * 64)
    resumed.state.load_state_dict(restored.client_state["dro"])
    found = [resumed.run(step, LR).group_weight.numpy().tolist() for step in (2, 3)]
    resumed.engine.destroy()
    return wanted, found


def error_11(folder):
    report = {}
    for objective in ("gdrt", "group_dro"):
        run = Path(folder) / f"resume_{objective}"
        if run.exists():
            import shutil

            shutil.rmtree(run)
        run.mkdir()
        report[objective] = run_ranks(
            2,
            _resume,
            Cell(1, **PLAIN, estimate="ema", objective=objective, options=(("dro.eta", 1.0),)),
            folder,
        )
    return report


MEASUREMENTS = {name: function for name, function in list(globals().items()) if name.startswith("error_")}


def main(output, folder):
    tiny_model(Path(folder), False)
    Path(output).write_text(
        json.dumps({name: function(Path(folder)) for name, function in MEASUREMENTS.items()})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
