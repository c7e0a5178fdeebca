"""A training step against the bare time of its own matrix products.

    python benchmarks/step_floor.py [--quantization none|nf4] [--samples 32] [--rounds 5] [--json] [--quick]
    python benchmarks/step_floor.py --profile      also prints where the step's time goes

The step is the trainer's own: SmolLM2-135M, growing windows of MovieLens-100k, train.packing=prefix_tree,
LoRA of rank 16 on all linear layers, `model.dtype=auto`. While one step runs, every matrix product is written
down with its shapes, strides and dtypes: linear layers, adapters, output head, and the two products of each
attention call. A product with packed weights counts as one with plain weights. The floor is the time that
these products take alone, one after the other, on other values. Steps and floors alternate, and the ratio is
the median of the rounds, so that other work on the machine disturbs both alike. On a CPU they are CPU seconds
of this process; set OMP_NUM_THREADS to the cores that are free.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from one_rank import clock  # sets the environment of torch, so it stands before it

# isort: split
import numpy as np
import torch
from machine_line import machine
from torch.utils._python_dispatch import TorchDispatchMode

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a factor."""


def layout(tensor: torch.Tensor) -> Layout:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


class Products(TorchDispatchMode):
    """Writes down the matrix products that run while it is on: (factor, factor) -> how often."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[tuple[Layout, Layout]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1].split(".")[0]
        if name in ("mm", "bmm"):
            self.counts[layout(args[0]), layout(args[1])] += 1
        elif name in ("addmm", "addmm_", "baddbmm"):
            self.counts[layout(args[1]), layout(args[2])] += 1
        elif name == "gemm_4bit":
            self._packed(*args)
        elif name.startswith("_scaled_dot_product"):
            self._attention(*args, backward="backward" in name)
        return function(*args, **(kwargs or {}))

    def _packed(self, x: torch.Tensor, weight: torch.Tensor, shape, *rest) -> None:
        """x [..., K] with a packed [N, K]."""
        rows = x.numel() // x.shape[-1]
        outputs, inputs = shape
        plain = ((inputs, outputs), (1, inputs), x.dtype)
        self.counts[((rows, inputs), (inputs, 1), x.dtype), plain] += 1

    def _attention(self, *args, backward: bool) -> None:
        """Two products forward, five backward (the scores are computed again)."""
        query, key = args[1:3] if backward else args[:2]
        heads, rows, size = query.shape[0] * query.shape[1], query.shape[2], query.shape[3]
        columns = key.shape[2]
        scores = ((heads, rows, size), (rows * size, size, 1), query.dtype)
        transposed = ((heads, size, columns), (columns * size, 1, size), query.dtype)
        mixing = ((heads, rows, columns), (rows * columns, columns, 1), query.dtype)
        values = ((heads, columns, size), (columns * size, size, 1), query.dtype)
        self.counts[scores, transposed] += 2 if backward else 1
        self.counts[mixing, values] += 3 if backward else 1


def flops(counts: Counter) -> float:
    """Multiplications and additions of all products."""
    total = 0.0
    for (left, right), number in counts.items():
        total += 2.0 * np.prod(left[0]) * right[0][-1] * number
    return total


class Floor:
    """The products of a step, ready to be timed alone."""

    def __init__(self, counts: Counter, device: torch.device):
        self.jobs = []
        for (left, right), number in counts.items():
            factors = [
                torch.empty_strided(shape, strides, dtype=dtype, device=device).normal_()
                for shape, strides, dtype in (left, right)
            ]
            self.jobs.append((*factors, number))

    def run(self) -> None:
        for left, right, number in self.jobs:
            out = left @ right
            for _ in range(number - 1):
                torch.matmul(left, right, out=out)


def make_runner(options, folder: Path):
    """The trainer's runner of steps for one rank, and the facts to print."""
    from gdrt_ds import dro
    from gdrt_ds.config import load_config
    from gdrt_ds.objectives import get_objective
    from gdrt_ds.runtime import start_runtime
    from gdrt_ds.training.job import Job
    from gdrt_ds.training.loading import load
    from gdrt_ds.training.preparation import prepare
    from gdrt_ds.training.step import StepRunner, TrainTokens

    config = load_config(
        None,
        [
            f"run.dir={folder}",
            f"data.path={options.data}",
            "data.windows=growing",
            f"prompt.template={options.template}",
            f"data.limit_train={options.limit}",
            f"model.path={options.model}",
            f"model.quantization={options.quantization}",
            f"model.dtype={options.dtype}",
            "model.lora={r: 16, alpha: 32, dropout: 0.0, targets: all-linear}",
            "objective=sft",
            "train.packing=prefix_tree",
            f"train.global_batch={options.samples}",
            f"train.micro_batch={options.samples}",
            "train.warmup_steps=0",
            f"deepspeed={options.deepspeed}",
        ],
    )
    runtime = start_runtime()
    job = Job(config, runtime, folder, 0, time.time())
    prepared = prepare(config)
    loaded = load(job, prepared)
    store = prepared.stores["train"]
    groups = np.zeros(int(store.target_offsets[-1]), dtype=np.int16)
    runner = StepRunner(
        loaded.engine,
        loaded.plan,
        TrainTokens(store, groups, 1),
        get_objective("sft"),
        config,
        dro.DroState(1).to(runtime.device),
        runtime,
        packing=loaded.packing,
        prefix_length=prepared.data.prefix_length,
        pad_id=prepared.tokenizer.pad_token_id,
    )
    return runner, runtime.device, str(loaded.dtype).removeprefix("torch.")


def measure(options, folder: Path) -> None:
    runner, device, dtype = make_runner(options, folder)
    warm = runner.run(0, 1e-5)
    products = Products()
    with products:
        runner.run(1, 1e-5)
    floor = Floor(products.counts, device)
    floor.run()
    steps, floors = [], []
    for _ in range(options.rounds):
        start = clock()
        runner.run(1, 1e-5)
        between = clock()
        floor.run()
        steps.append(between - start)
        floors.append(clock() - between)
    ratios = [step / alone for step, alone in zip(steps, floors)]
    record = {
        "name": "step_floor",
        "ours": statistics.median(steps),
        "floor": statistics.median(floors),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "shape": {
            "model": options.model,
            "data": options.data,
            "samples": options.samples,
            "tokens": warm.tokens,
            "quantization": options.quantization,
            "dtype": dtype,
            "gflop": round(flops(products.counts) / 1e9),
        },
        "machine": machine(),
    }
    if options.profile:
        print_profile(runner)
    if options.json:
        print(json.dumps(record))
        return
    shape = record["shape"]
    print(
        f"{options.samples} targets, {shape['tokens']} tokens, {shape['gflop']} GFLOP of products, {dtype}, "
        f"{options.quantization}; {record['machine']}"
    )
    print(
        f"step {record['ours']:.2f} s, its products alone {record['floor']:.2f} s: {record['ratio']:.2f} x "
        f"(rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    )


def print_profile(runner) -> None:
    """The operators of one step by their own time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=False) as found:
        runner.run(1, 1e-5)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--template", default="alpaca", help="prompt.template, e.g. list")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization", default="none", choices=("none", "nf4"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--deepspeed", default="ds_configs/zero1.json")
    parser.add_argument("--samples", type=int, default=32, help="targets of a step")
    parser.add_argument("--limit", type=int, default=4000, help="train windows that are prepared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    parser.add_argument("--quick", action="store_true", help="fewer targets and rounds: within a minute")
    options = parser.parse_args()
    if options.quick:
        options.samples = min(options.samples, 16)
        options.limit = min(options.limit, 500)
        options.rounds = min(options.rounds, 3)
    from gdrt_ds.runtime import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        measure(options, Path(scratch))


if __name__ == "__main__":
    main()
