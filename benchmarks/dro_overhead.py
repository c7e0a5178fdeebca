"""What Group DRO adds to a training step: GDRT steps against SFT steps of the same engine, interleaved in
one process.

    python benchmarks/dro_overhead.py [--json] [--quick] [--rounds N]

Four rows: gdrt with accumulation 1 (exact weights need no second forward), `ema` without and with
accumulation, and exact `batch` under accumulation, which pays a no-grad first pass. Every row has its own
SFT steps; the ratio is the median of paired rounds, so that a machine that other jobs share disturbs both
sides alike. CPU seconds of the process decide, not the wall clock. Exit status 0 always.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from pathlib import Path

from one_rank import clock  # sets the environment of torch, so it stands before it

# isort: split
import numpy as np
import torch
from machine_line import machine

from gdrt_ds.batches import BatchPlan
from gdrt_ds.config import RunConfig
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.dro import DroState
from gdrt_ds.models.built_in import make_tiny_model
from gdrt_ds.models.load import load_model
from gdrt_ds.models.source import compute_dtype
from gdrt_ds.objectives import get_objective
from gdrt_ds.runtime import Runtime, quiet_libraries
from gdrt_ds.training.deepspeed_config import fill_deepspeed_config, read_deepspeed_config
from gdrt_ds.training.model_with_loss import FusedLossModel
from gdrt_ds.training.step import StepRunner, TrainTokens
from gdrt_ds.training.zero3_units import adapted_layers_as_units

HIDDEN, LAYERS, VOCABULARY, SAMPLES, TOKENS, TARGET, GLOBAL_BATCH, GROUPS = 256, 4, 16_384, 64, 96, 12, 8, 8
ROWS = [
    ("gdrt, accumulation 1", "batch", 1),
    ("gdrt ema, accumulation 1", "ema", 1),
    ("gdrt ema, accumulation 4", "ema", 4),
    ("gdrt exact batch, accumulation 4", "batch", 4),
]


def make_store() -> TokenStore:
    rng = np.random.default_rng(0)
    lengths = rng.integers(TOKENS // 2, TOKENS * 3 // 2, SAMPLES)

    def sums(values):
        return np.concatenate([[0], np.cumsum(values)]).astype(np.int64)

    targets = rng.integers(TARGET // 2, TARGET * 3 // 2, SAMPLES).astype(np.int32)
    ids = rng.integers(3, VOCABULARY - 1, lengths.sum()).astype(np.int32)
    return TokenStore(ids, sums(lengths), np.zeros(len(ids), np.int8), targets, sums(targets))


def make_runners(folder: Path, estimate: str, accumulation: int) -> tuple[StepRunner, StepRunner]:
    """(gdrt, sft) on one ZeRO-3 engine; lr 0, so both see the same weights at every step."""
    import deepspeed

    path = make_tiny_model(
        folder / "model",
        ["a b"],
        hidden=HIDDEN,
        num_layers=LAYERS,
        num_heads=4,
        num_key_value_heads=4,
        intermediate=2 * HIDDEN,
        vocab_multiple=VOCABULARY,
    )
    config = RunConfig.model_validate(
        {
            "model": {"path": str(path), "quantization": "none", "lora": {"targets": "all-linear"}},
            "dro": {"estimate": estimate},
            "train": {
                "global_batch": GLOBAL_BATCH,
                "micro_batch": GLOBAL_BATCH // accumulation,
                "optimizer": "sgd",
            },
        }
    )
    store, runtime = (
        make_store(),
        Runtime(device=torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    )
    plan = BatchPlan(store.lengths, GLOBAL_BATCH, GLOBAL_BATCH // accumulation, 1, 0)
    dtype = compute_dtype(config.model.dtype, runtime.device)
    settings = fill_deepspeed_config(
        read_deepspeed_config("ds_configs/zero3.json"), config, plan, dtype, HIDDEN
    )
    loaded = load_model(
        config.model, runtime, train=True, path=path, attention="gdrt_tree", deepspeed_config=settings
    )
    module = FusedLossModel(loaded.model)
    trainable = [p for p in module.parameters() if p.requires_grad]
    with adapted_layers_as_units(loaded.model, 3):
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=trainable,
            optimizer=torch.optim.SGD(trainable, lr=0.0),
            config=settings,
        )
    engine.train()
    groups = np.random.default_rng(1).integers(0, GROUPS, int(store.target_offsets[-1])).astype(np.int16)
    tokens = TrainTokens(store, groups, GROUPS)
    runners = [
        StepRunner(
            engine,
            plan,
            tokens,
            get_objective(name),
            config,
            DroState(GROUPS).to(runtime.device),
            runtime,
            packing="packed",
            prefix_length=0,
            pad_id=2,
        )
        for name in ("gdrt", "sft")
    ]
    return runners[0], runners[1]


def seconds_of(runner: StepRunner, step: int) -> float:
    started = clock()
    runner.run(step, 0.0)
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under a minute on 2 cores")
    parser.add_argument("--rounds", type=int, help="paired steps per row (default 40, quick 10)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet_libraries()
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    rounds = arguments.rounds or (10 if arguments.quick else 40)
    shape = (
        f"H{HIDDEN} L{LAYERS} V{VOCABULARY} global batch {GLOBAL_BATCH} x {TOKENS} tokens, {TARGET} "
        f"targets, G{GROUPS}"
    )
    if not arguments.json:
        print(f"GDRT step against SFT step, {shape}, ZeRO-3, {machine()}, {rounds} paired rounds\n")
        print("| | gdrt ms | sft ms | ratio (median of pairs) | quartiles |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, estimate, accumulation in ROWS:
            gdrt, sft = make_runners(Path(folder), estimate, accumulation)
            for runner in (gdrt, sft, gdrt, sft):
                runner.run(0, 0.0)
            pairs = []
            for index in range(rounds):
                order = (gdrt, sft) if index % 2 else (sft, gdrt)
                took = {runner: seconds_of(runner, index) for runner in order}
                pairs.append((took[gdrt], took[sft]))
            ratios = sorted(a / b for a, b in pairs)
            ours, peer = statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
            low, high = ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
            if arguments.json:
                print(
                    json.dumps(
                        {
                            "name": name,
                            "ours": ours,
                            "peer": peer,
                            "ratio": statistics.median(ratios),
                            "ratio_quartiles": [low, high],
                            "unit": "s",
                            "shape": shape,
                            "machine": machine(),
                            "rounds": rounds,
                        }
                    ),
                    flush=True,
                )
            else:
                print(
                    f"| {name} | {1e3 * ours:.1f} | {1e3 * peer:.1f} | {statistics.median(ratios):.3f} | "
                    f"{low:.3f} .. {high:.3f} |",
                    flush=True,
                )
            gdrt.engine.destroy()


if __name__ == "__main__":
    main()
