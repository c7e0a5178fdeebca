"""Ranks behind test_step.py.

Collectives and host synchronisations of a step, NaN on one rank, the trap of held graphs under ZeRO-3.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
import weakref
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from gdrt_ds.training.broken_numbers import NonFiniteLoss
from gdrt_ds.training.loading import free_engine
from tests.distributed.exact_cells import (
    LR,
    Cell,
    full_gradients,
    full_parameters,
    make_config,
    start_runner,
    tiny_model,
)
from tests.distributed.ranks import run_ranks

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "broadcast_object_list",
    "barrier",
    "gather",
    "scatter",
    "all_to_all",
    "send",
    "recv",
)
HOST_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")
OTHERS = ("/deepspeed/", "/transformers/", "/peft/", "/bitsandbytes/", "/torch/")


def _owner() -> str | None:
    """file:function of the innermost frame that is ours; None when another package made the call."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if "/gdrt_ds/" in frame.filename and "site-packages" not in frame.filename:
            return f"{Path(frame.filename).name}:{frame.name}"
        if any(part in frame.filename for part in OTHERS):
            return None
    return None


class Watch:
    """Counts collectives and host reads that gdrt_ds makes while it is on."""

    def __enter__(self):
        self.collectives, self.reads, self.undo = Counter(), Counter(), []
        for owner, names, counter in (
            (dist, COLLECTIVES, self.collectives),
            (torch.Tensor, HOST_READS, self.reads),
        ):
            for name in names:
                original = getattr(owner, name, None)
                if original is not None:
                    self.undo.append((owner, name, original, name in vars(owner)))
                    setattr(owner, name, self._counted(original, name, counter))
        return self

    @staticmethod
    def _counted(original, name, counter):
        def wrapper(*args, **kwargs):
            owner = _owner()
            if owner is not None:
                counter[f"{owner}:{name}"] += 1
            return original(*args, **kwargs)

        return wrapper

    def __exit__(self, *exc):
        for owner, name, original, own in self.undo:
            setattr(owner, name, original) if own else delattr(owner, name)


def watch_steps(rank, world, cells, folder):
    """Per cell: what one step in the middle of a run asks of the network and of the host."""
    report = []
    for cell in cells:
        runner = start_runner(cell, rank, world, folder)
        runner.run(0, LR)
        with Watch() as watch:
            step = runner.run(1, LR)
        report.append(
            {
                "cell": cell.name(),
                "accumulation": cell.accumulation,
                "collectives": dict(watch.collectives),
                "reads": dict(watch.reads),
                "tokens": step.tokens,
                "all_tokens": step.all_tokens.item(),
            }
        )
        engine = weakref.ref(runner.engine)
        free_engine(runner.engine)
        del runner, watch
        gc.collect()
        report[-1]["freed"] = engine() is None
    return report


def _end(runner) -> None:
    runner.engine.destroy()
    gc.collect()


def _snapshot(runner) -> list[torch.Tensor]:
    """Everything that a step may change: master weights, moments, full parameters, DRO state.

    Copies in a fixed order.
    """
    inner = runner.engine.basic_optimizer
    tensors = [p.detach().clone() for group in inner.param_groups for p in group["params"]]
    tensors += [
        v.clone() if isinstance(v, torch.Tensor) else torch.tensor(v)
        for p in inner.state
        for _, v in sorted(inner.state[p].items())
    ]
    tensors += [torch.from_numpy(v) for _, v in sorted(full_parameters(runner.engine).items())]
    return tensors + [v.clone() for _, v in sorted(runner.state.state_dict().items())]


def _same(first, second) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


def _plant_nan(runner, rank: int) -> list:
    """One hidden state of the last rank becomes NaN while the switch is on."""
    module, switch = runner.engine.module, [False]
    hidden = module.hidden

    def poisoned(micro):
        states = hidden(micro)
        if switch[0] and rank == 0 and len(states):
            states = states * torch.where(torch.arange(len(states)) == 0, float("nan"), 1.0)[:, None]
        return states

    module.hidden = poisoned
    return switch


def nonfinite(rank, world, cells, folder):
    """skip: nothing moves and the run goes on as if the step had not been; stop.

    Every rank raises before the optimizer.
    """
    adam, report = torch.optim.AdamW, []
    for cell in cells:
        config = make_config(cell, folder, world)
        config.train.on_nonfinite = "skip"
        runner = start_runner(cell, rank, world, folder, config, adam)
        switch = _plant_nan(runner, rank)
        runner.run(0, 0.01)
        before = _snapshot(runner)
        switch[0] = True
        result = runner.run(1, 0.01)
        after = _snapshot(runner)
        switch[0] = False
        runner.run(2, 0.01)
        final = _snapshot(runner)
        config.train.on_nonfinite, switch[0], raised = "stop", True, False
        try:
            runner.run(3, 0.01)
        except NonFiniteLoss:
            raised = True
        stopped = _snapshot(runner)
        _end(runner)
        control = start_runner(cell, rank, world, folder, config, adam)
        control.run(0, 0.01)
        control.run(2, 0.01)
        report.append(
            {
                "cell": cell.name(),
                "stage": cell.stage,
                "skipped": result.skipped,
                "untouched": _same(before, after),
                "moved": not _same(after, final),
                "as_if_never": _same(final, _snapshot(control)),
                "raised": raised,
                "stopped_untouched": _same(final, stopped),
            }
        )
        _end(control)
    return report


def held_graphs(rank, world, folder):
    """Norm of the gradient error when both micro-batch graphs are held before the first backward, against the
    runner's order.
    """
    report = {}
    for stage in (2, 3):
        runner = start_runner(Cell(accumulation=2, stage=stage, objective="sft"), rank, world, folder)
        micro_steps = [slots[rank] for slots in runner.plan.step(0)]
        coefficients = torch.full((6,), 1e-2, dtype=torch.float64)
        found = []
        for held in (False, True):
            graphs = []
            for index, samples in enumerate(micro_steps):
                runner.engine.set_gradient_accumulation_boundary(index == 1)
                forward = runner._forward(samples, 0, index)
                graphs.append((forward.sums, forward.values))
                if not held:
                    runner._backward(*graphs.pop(), coefficients, None)
            for index, graph in enumerate(graphs):
                runner.engine.set_gradient_accumulation_boundary(index == 1)
                runner._backward(*graph, coefficients, None)
            found.append(full_gradients(runner.engine))
            from gdrt_ds.training.step import discard_gradients

            discard_gradients(runner.engine)

        def norm(gradients):
            return float(sum((g**2).sum() for g in gradients.values()) ** 0.5)

        report[str(stage)] = {
            "right": norm(found[0]),
            "held": norm(found[1]),
            "error": norm({n: found[1][n] - g for n, g in found[0].items()}),
        }
        _end(runner)
    return report


def main(output, folder):
    folder = Path(folder)
    tiny_model(folder, False)
    watched = [
        Cell(1, 3),
        Cell(4, 3),
        Cell(2, 3, estimate="ema"),
        Cell(2, 2, objective="sft"),
        Cell(2, 3, objective="cvar"),
        Cell(2, 1, objective="group_dro"),
    ]
    report = {
        "watch": run_ranks(2, watch_steps, watched, folder),
        "held": run_ranks(2, held_graphs, folder)[0],
        "nonfinite": run_ranks(
            2,
            nonfinite,
            [Cell(a, stage, estimate=e) for stage in (0, 1, 2, 3) for a, e in ((1, "batch"), (2, "ema"))],
            folder,
            timeout_s=400,
        ),
    }
    Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
