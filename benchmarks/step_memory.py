"""What a rank holds of the 4-bit base during a step: this package's 4-bit layer against bitsandbytes' own.

    python benchmarks/step_memory.py [--world 1 2 4] [--presets [--only hpz]] [--layers 2] [--json] [--quick]

Real trainer, real engine, random Llama, forked gloo ranks. All figures are of step 3, when DeepSpeed's
trace is complete and reuse distances act:

held   bytes of packed weights alive between forward and backward, beside the rank's own slice
peak   most bytes of tensors that the step made and that were alive at one time (activations included)

Without --presets, nothing may stay: reuse distance, prefetch and persistence are 0. The promise is then
that at most two layers are held; otherwise the exit status is 1. With --presets every shipped ZeRO-3
preset runs on the shape of Llama-3-8B with `--layers` of its 32 layers, and what `--plan` says of
gathered parameters stands beside. `zero3_hpz` runs on four ranks, as two nodes of two.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forked ranks must not inherit a thread pool
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine_line import machine  # noqa: E402
from random_model import write_random_model  # noqa: E402

NOTHING_STAYS = {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 1,
}
STEPS = 3


def measure(rank: int, world: int, way: str, model: str, deepspeed: str, settings: list[str]) -> dict:
    """Takes three steps of the real trainer; returns the figures of the third and the losses of all."""
    import torch

    from gdrt_ds.config import load_config
    from gdrt_ds.models import four_bit
    from gdrt_ds.objectives import get_objective
    from gdrt_ds.planning.memory_plan import gathered_bytes
    from gdrt_ds.runtime import Runtime
    from gdrt_ds.training.job import open_job
    from gdrt_ds.training.loading import load
    from gdrt_ds.training.run import make_ready, prepare_data
    from gdrt_ds.training.tensor_bytes import TensorBytes

    sys.stdout = sys.stderr  # what the run announces is not part of the figures
    if way == "stock":
        four_bit.use_four_bit_linear = lambda model: 0
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, [*settings, f"model.path={model}", f"deepspeed={deepspeed}"])
        config.run.dir = f"{folder}/run{rank}"
        runtime = Runtime(rank=rank, world=world, local_rank=rank, local_world=world, threads=1)
        job = open_job(config, Runtime(threads=1))  # a folder of its own for every rank: nothing is kept
        job = type(job)(config, runtime, job.folder, job.life, job.started)
        prepared = prepare_data(job)
        loaded = load(job, prepared)
        _, _, runner = make_ready(job, prepared, loaded, get_objective("sft"))
        engine = loaded.engine
        parameters = list(engine.module.parameters())
        packed = [p for p in parameters if getattr(p, "quant_state", None) is not None]
        slices = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
        seen = {}
        backward = engine.backward

        def watched(loss, *args, **kwargs):
            seen["held"] = tensors.alive(torch.uint8)
            return backward(loss, *args, **kwargs)

        engine.backward = watched
        losses = []
        for step in range(STEPS):
            with TensorBytes(besides=slices + [p.data for p in parameters]) as tensors:
                losses.append(float(runner.run(step, 1e-4).loss))
        layers = prepared.model_config.num_hidden_layers
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in packed)
        from gdrt_ds.models.inventory import take_inventory

        inventory = take_inventory(config.model, prepared.model_config)
        zero = engine._config._param_dict["zero_optimization"]
        return {
            "losses": losses,
            "whole": whole,
            "layer": whole // layers,
            "held": seen["held"],
            "peak": tensors.peak_bytes,
            "planned": gathered_bytes(config, inventory, zero, whole, 2) if world > 1 else 0,
        }


def settings_of(options) -> list[str]:
    return [
        "data.path=planted",
        "data.planted={num_train: 64, num_valid: 8, num_test: 8}",
        "prompt.template=configs/prompts/short.json",
        "model.dtype=bfloat16",
        "model.gradient_checkpointing=true",
        "model.lora={r: 8, alpha: 16, dropout: 0.0, targets: all-linear}",
        "train.global_batch=4",
        "train.micro_batch=1",
        f"train.max_steps={STEPS}",
        "objective=sft",
    ]


def row(name: str, world: int, model: Path, deepspeed: str, options) -> dict:
    from tests.distributed.ranks import run_ranks

    found = {}
    for way in ("ours", "stock"):
        ranks = run_ranks(
            world, measure, way, str(model), deepspeed, settings_of(options), timeout_s=options.timeout_s
        )
        found[way] = max(ranks, key=lambda rank: rank["held"])
        found[way]["peak"] = max(rank["peak"] for rank in ranks)
    ours, stock = found["ours"], found["stock"]
    return {
        "name": name,
        "world": world,
        "ours": ours["held"],
        "peer": stock["held"],
        "ratio": ours["held"] / max(1, stock["held"]),
        "peak_ours": ours["peak"],
        "peak_peer": stock["peak"],
        "whole": ours["whole"],
        "layer": ours["layer"],
        "planned_gathered": ours["planned"],
        "same_losses": ours["losses"] == stock["losses"],
        "machine": machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--presets", action="store_true")
    parser.add_argument("--only", help="with --presets: only presets whose name holds this")
    parser.add_argument("--layers", type=int, default=2, help="layers of the 8B shape (--presets)")
    parser.add_argument("--timeout-s", type=int, default=3600)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.world = [2]
    kept = True
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        if options.presets:
            model = write_random_model(Path(folder) / "model", "llama3-8b", options.layers)
            for preset in sorted((ROOT / "ds_configs").glob("*.json")):
                content = json.loads(preset.read_text(encoding="utf-8"))
                zero = content["zero_optimization"]
                if "zero_hpz_partition_size" in zero:
                    # Two nodes of two ranks stand for the preset's nodes of eight.
                    zero["zero_hpz_partition_size"] = 2
                    small = Path(folder) / preset.name
                    small.write_text(json.dumps(content), encoding="utf-8")
                    rows.append((f"{preset.stem}, nodes of 2", 4, model, str(small)))
                elif zero["stage"] == 3:
                    rows.append((preset.stem, 2, model, str(preset)))
        else:
            model = write_random_model(Path(folder) / "model", "small")
            config = json.loads((ROOT / "ds_configs" / "zero3_qlora.json").read_text(encoding="utf-8"))
            config["zero_optimization"].update(NOTHING_STAYS)
            path = Path(folder) / "nothing_stays.json"
            path.write_text(json.dumps(config), encoding="utf-8")
            rows = [("nothing stays", world, model, str(path)) for world in options.world]
        for name, world, model, deepspeed in rows:
            if options.only and options.only not in name:
                continue
            found = row(name, world, model, deepspeed, options)
            if not options.presets and world > 1 and found["ours"] > 2 * found["layer"]:
                kept = False
            if not found["same_losses"]:
                kept = False
            if options.json:
                print(json.dumps(found), flush=True)
                continue
            sizes = {key: value / 2**20 for key, value in found.items() if isinstance(value, int)}
            print(
                f"{name}, {world} rank(s): packed base {sizes['whole']:.1f} MiB, a layer "
                f"{sizes['layer']:.1f}; held between forward and backward: ours {sizes['ours']:.1f}, "
                f"stock {sizes['peer']:.1f}; peak of a step: ours {sizes['peak_ours']:.0f}, "
                f"stock {sizes['peak_peer']:.0f}; planned gathered {sizes['planned_gathered']:.0f}; "
                f"same losses: {found['same_losses']}",
                flush=True,
            )
    if not options.json:
        print(machine())
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
