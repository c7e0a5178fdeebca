"""What ZeRO-3 costs besides products and communication: a step on one rank, of a model too small to count.

    python benchmarks/zero3_overhead.py [--layers 24] [--rounds 8] [--json] [--quick]

A tiny Llama with an NF4 base and LoRA on all linear layers, without and with recomputed activations, under
three engines: ZeRO-1; ZeRO-3 as DeepSpeed is, with hooks on every module; ZeRO-3 as the trainer starts it,
with an adapted layer as one unit (gdrt_ds/training/zero3_units.py). All three live in one process and take
the same steps in turn. Losses and gradient norms of both ZeRO-3 engines have to be equal to the last bit.
Seconds are CPU seconds of this process, or the wall clock of a GPU; a figure is the median of the rounds.

Promise: the trainer's step takes at most .85 of one with hooks on every module.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from one_rank import clock  # sets the environment of torch, so it stands before it

# isort: split
import torch
from machine_line import machine

MOST_OF_EVERYWHERE = 0.85
WARM_UP = 3
"""Steps before the clock: DeepSpeed records the order of modules in the first two."""
TOKENS = 12
HIDDEN, INTERMEDIATE = 64, 128
LAYER_ELEMENTS = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE


class Engine:
    """One engine around its own copy of the model."""

    def __init__(self, path: Path, stage: int, units, checkpointing: bool):
        """Args: units: the context in which DeepSpeed is started."""
        import deepspeed

        from gdrt_ds.config import ModelSection
        from gdrt_ds.models.load import load_model
        from gdrt_ds.training.deepspeed_config import zero3_limits

        section = ModelSection(
            path=str(path),
            dtype="float32",
            gradient_checkpointing=checkpointing,
            lora={"r": 8, "dropout": 0.0, "targets": "all-linear"},
        )
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "train_batch_size": 1,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": stage, **zero3_limits(HIDDEN, LAYER_ELEMENTS)},
        }
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        runtime = SimpleNamespace(device=device, rank=0, world=1)
        model = load_model(section, runtime, train=True, seed=0, deepspeed_config=config).model
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with units(model, stage):
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=torch.optim.AdamW(trainable, lr=1e-3), config=config
            )
        self.device = device
        self.seconds: list[float] = []
        self.figures: list[tuple[float, float]] = []

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 200, (1, TOKENS), generator=generator).to(self.device)
        start = clock()
        loss = self.engine(input_ids=ids, labels=ids).loss
        self.engine.backward(loss)
        self.engine.step()
        self.seconds.append(clock() - start)
        self.figures.append((float(loss), float(self.engine.get_global_grad_norm())))


@contextlib.contextmanager
def hooks_everywhere(model, stage):
    yield 0


def measure(path: Path, checkpointing: bool, rounds: int) -> dict[str, float]:
    """Milliseconds of a step by engine, and whether both ZeRO-3 engines computed the same."""
    from gdrt_ds.training.zero3_units import adapted_layers_as_units

    engines = {
        "ZeRO-1": Engine(path, 1, hooks_everywhere, checkpointing),
        "ZeRO-3, hooks on every module": Engine(path, 3, hooks_everywhere, checkpointing),
        "ZeRO-3, as trained": Engine(path, 3, adapted_layers_as_units, checkpointing),
    }
    for number in range(WARM_UP + rounds):
        for engine in engines.values():
            engine.step(number)
    _, everywhere, trained = engines.values()
    if everywhere.figures != trained.figures:
        sys.exit("losses or gradient norms differ between both ZeRO-3 engines")
    return {name: 1000 * statistics.median(engine.seconds[WARM_UP:]) for name, engine in engines.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--quick", action="store_true", help="8 layers, 4 rounds")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.rounds = 8, 4

    import deepspeed

    from gdrt_ds.models.built_in import make_tiny_model

    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny_model(
            Path(folder) / "tiny",
            ["The Matrix (1999)", "Toy Story (1995)", "Heat (1995)"],
            0,
            hidden=HIDDEN,
            intermediate=INTERMEDIATE,
            num_layers=args.layers,
        )
        found = {
            name: measure(path, checkpointing, args.rounds)
            for name, checkpointing in (("activations kept", False), ("activations recomputed", True))
        }
    if not args.json:
        print(f"{args.layers} layers; {machine()}")
    for name, milliseconds in found.items():
        everywhere = milliseconds["ZeRO-3, hooks on every module"]
        ratio = milliseconds["ZeRO-3, as trained"] / everywhere
        if args.json:
            figures = {"name": name, "ratio": round(ratio, 3), "milliseconds": milliseconds}
            print(json.dumps({**figures, "layers": args.layers, "machine": machine()}))
            continue
        print(f"  {name}: losses and gradient norms of both ZeRO-3 engines are equal to the last bit")
        for engine, value in milliseconds.items():
            print(f"    {engine:30s} {value:7.0f} ms {value / everywhere:6.2f}")
    slow = [
        name
        for name, milliseconds in found.items()
        if milliseconds["ZeRO-3, as trained"]
        > MOST_OF_EVERYWHERE * milliseconds["ZeRO-3, hooks on every module"]
    ]
    if slow:
        sys.exit(f"more than {MOST_OF_EVERYWHERE} of a step with hooks on every module: {', '.join(slow)}")


if __name__ == "__main__":
    main()
