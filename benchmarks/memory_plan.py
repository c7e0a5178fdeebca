"""What `--plan` predicts against what a run takes: peak memory per rank, real launches of the real trainer.

    python benchmarks/memory_plan.py [--json] [--quick] [--model smollm2-135m] [--allocator
    auto|glibc|LIBRARY]

Every row trains two steps on generated data under `deepspeed --num_gpus W` and reads the measured peak
from the run's summary.json (CPU: resident memory beyond imports and data; GPU: allocated tensor bytes).
Exit status 1 if a prediction is off by more than the
promised share: 25 % on a CPU, 10 % on a GPU. On a CPU the promise is for allocators that reuse freed
blocks: tcmalloc or jemalloc is preloaded where it is installed; `--allocator glibc` shows what the
system's own allocator keeps, and is not judged.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launching import find_allocator, trainer_command, trainer_environment  # noqa: E402
from machine_line import machine  # noqa: E402

COMMON = [
    "prompt.template=alpaca",
    "model.lora={r: 8, alpha: 16, dropout: 0.05, targets: [q_proj, v_proj]}",
    "model.train_head=false",
    "train.max_steps=2",
    "train.eval_every=2",
    "train.warmup_steps=0",
    "train.global_batch=64",
    "data.planted={num_train: 512, num_valid: 16, num_test: 16}",
]
# name, ranks, settings
ROWS = [
    (
        "nf4, ZeRO-3, shared prefix",
        1,
        [
            "model.quantization=nf4",
            "deepspeed=ds_configs/zero3_qlora.json",
            "train.packing=shared_prefix",
            "train.micro_batch=16",
        ],
    ),
    (
        "nf4, ZeRO-3, shared prefix",
        2,
        [
            "model.quantization=nf4",
            "deepspeed=ds_configs/zero3_qlora.json",
            "train.packing=shared_prefix",
            "train.micro_batch=16",
        ],
    ),
    (
        "nf4, ZeRO-3, padded",
        2,
        [
            "model.quantization=nf4",
            "deepspeed=ds_configs/zero3_qlora.json",
            "train.packing=none",
            "train.micro_batch=16",
        ],
    ),
    (
        "nf4, ZeRO-3, padded, large batch",
        1,
        [
            "model.quantization=nf4",
            "deepspeed=ds_configs/zero3_qlora.json",
            "train.packing=none",
            "train.micro_batch=32",
        ],
    ),
    (
        "nf4, ZeRO-3, checkpointed",
        1,
        [
            "model.quantization=nf4",
            "deepspeed=ds_configs/zero3_qlora.json",
            "train.packing=none",
            "train.micro_batch=32",
            "model.gradient_checkpointing=true",
        ],
    ),
    (
        "float32 base, ZeRO-1",
        1,
        [
            "model.quantization=none",
            "deepspeed=ds_configs/zero1.json",
            "train.packing=none",
            "train.micro_batch=16",
        ],
    ),
    (
        "float32 base, ZeRO-3",
        2,
        [
            "model.quantization=none",
            "deepspeed=ds_configs/zero3_qlora.json",
            "train.packing=none",
            "train.micro_batch=16",
        ],
    ),
]


def predicted_bytes(overrides: list[str], world: int) -> dict[str, int]:
    """Parts of the plan, by the same functions as `--plan`."""
    from gdrt_ds.config import load_config
    from gdrt_ds.planning.plan import plan_run
    from gdrt_ds.training.preparation import prepare

    config = load_config("configs/planted.yaml", overrides)
    return plan_run(config, prepare(config), world).memory.parts


def measured_bytes(overrides: list[str], world: int, folder: Path, preload: str | None) -> int:
    command = trainer_command(world, ["--config", "configs/planted.yaml", f"run.dir={folder}", *overrides])
    environment = trainer_environment(preload)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["peak_memory_bytes"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    parser.add_argument("--quick", action="store_true", help="the first row only")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--allocator",
        default="auto",
        help="host memory on a CPU: auto = tcmalloc or jemalloc where found, glibc, or a library's file name",
    )
    options = parser.parse_args()
    os.chdir(ROOT)
    import torch

    limit = 0.10 if torch.cuda.is_available() else 0.25
    preload = None if torch.cuda.is_available() else find_allocator(options.allocator)
    judged = torch.cuda.is_available() or preload is not None
    if not options.json:
        promise = (
            f"a prediction may be off by {limit:.0%}"
            if judged
            else (
                "not judged: the promise is for tcmalloc and jemalloc (Debian: libtcmalloc-minimal4, "
                "libjemalloc2)"
            )
        )
        allocator = "" if torch.cuda.is_available() else f"host memory by {preload or 'glibc'}; "
        print(
            f"{machine()}; {allocator}{promise}\n{'':36} "
            f"{'ranks':>5} {'plan MiB':>9} {'seen MiB':>9} {'plan/seen':>9}"
        )
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, world, settings) in enumerate(ROWS[:1] if options.quick else ROWS):
            overrides = [f"model.path={options.model}", *COMMON, *settings]
            parts = predicted_bytes(overrides, world)
            predicted, measured = (
                sum(parts.values()),
                measured_bytes(overrides, world, Path(folder) / str(number), preload),
            )
            ratio = predicted / measured
            failures += judged and abs(ratio - 1) > limit
            record = {
                "name": f"memory_plan: {name}",
                "world": world,
                "ours": predicted,
                "peer": measured,
                "ratio": round(ratio, 3),
                "unit": "bytes per rank",
                "parts": parts,
                "allocator": preload,
                "machine": machine(),
            }
            print(
                json.dumps(record)
                if options.json
                else f"{name:36} {world:>5} {predicted / 2**20:>9.0f} {measured / 2**20:>9.0f} {ratio:>9.2f}",
                flush=True,
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
