"""One training step of a 7B shape on one card, with the real trainer: memory against the plan, reads, losses.

The weights are random. The first losses of padded rows, of the tree attention and of `tree_sdpa` must be the
same; the peak of the third step is compared with what `--plan` says.
"""

from __future__ import annotations

import contextlib
import gc
import io
import sys
import time
import warnings
from pathlib import Path

import torch

from gdrt_ds.config import load_config
from gdrt_ds.objectives import get_objective
from gdrt_ds.planning.plan import plan_run
from gdrt_ds.runtime import start_runtime
from gdrt_ds.training.job import open_job
from gdrt_ds.training.loading import free_engine, load
from gdrt_ds.training.run import make_ready, prepare_data
from tests.gpu.rows import Row, Spot, at_most, same
from tests.host_reads import HostReads

WAYS = {
    "padded": ["train.packing=none"],
    "tree attention": ["train.packing=shared_prefix"],
    "tree_sdpa": ["train.packing=shared_prefix", "model.attention=tree_sdpa"],
    "packed": ["train.packing=packed"],
    "prefix tree": ["train.packing=prefix_tree"],
}
STEPS = 3
ROOT = Path(__file__).resolve().parents[2]
CPU_ONLY = "checks.py:"
"""Checks that run on CPUs only; on a device they are assertions of the device (loss/checks.py)."""


def run(spot: Spot) -> list[Row]:
    runtime = start_runtime()
    settings = settings_of(spot)
    rows = []
    losses = {}
    for way, more in WAYS.items():
        found = take_steps(spot, runtime, [*settings, *more], way)
        losses[way] = found["losses"]
        rows += rows_of(spot, way, found)
    tolerance = 1e-4 if spot.dry else 2e-2
    for way, values in losses.items():
        distance = abs(values[0] - losses["padded"][0]) / abs(losses["padded"][0])
        rows.append(at_most(f"{way}: first loss against padded rows, relative", distance, tolerance))
    return rows


def settings_of(spot: Spot) -> list[str]:
    settings = [
        "data.path=planted",
        "data.planted={num_train: 256, num_valid: 8, num_test: 8}",
        "model.lora={r: 16, alpha: 32, dropout: 0.0, targets: all-linear}",
        "model.gradient_checkpointing=true",
        "model.quantization=nf4",
        f"train.max_steps={STEPS}",
        "groups.by=random",
        "groups.num=4",
        "deepspeed=ds_configs/zero3_qlora.json",
    ]
    if spot.dry:
        # In float32, as the tolerance of a dry run says: some CPUs would train in bfloat16 by themselves.
        toy = ["model.path=tiny-random", "model.dtype=float32", "prompt.template=configs/prompts/short.json"]
        return [*settings, *toy, "train.global_batch=8", "train.micro_batch=8"]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from random_model import write_random_model

    folder = write_random_model(Path(spot.folder) / "model", "llama3-8b", spot.layers)
    size = ["prompt.template=alpaca", "train.global_batch=32", "train.micro_batch=32"]
    return [*settings, *size, f"model.path={folder}"]


def take_steps(spot: Spot, runtime, settings: list[str], way: str) -> dict:
    """Three steps; what the third one read of the device, its seconds, and the peak of all."""
    config = load_config(None, settings)
    config.run.dir = f"{spot.folder}/{way.replace(' ', '_')}"
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        job = open_job(config, runtime)
        prepared = prepare_data(job)
        loaded = load(job, prepared)
        _, _, runner = make_ready(job, prepared, loaded, get_objective(config.objective))
    found = {"losses": [], "told": told.getvalue()}
    for step in range(STEPS):
        started = time.perf_counter()
        if step == STEPS - 1:
            with waits(spot) as waited:
                result = runner.run(step, 1e-4)
            found["waits"] = sorted(waited)
        else:
            result = runner.run(step, 1e-4)
        if not spot.dry:
            torch.cuda.synchronize()
        found["seconds"] = time.perf_counter() - started
        found["losses"].append(float(result.loss))
        found["tokens"] = result.tokens
    found["peak"] = loaded.memory.bytes_here() or 0
    found["planned"] = plan_run(config, prepared, 1).memory.peak_bytes
    free_engine(loaded.engine)
    del loaded, runner
    gc.collect()
    if not spot.dry:
        torch.cuda.empty_cache()
    return found


@contextlib.contextmanager
def waits(spot: Spot):
    """Files of gdrt_ds that made the host wait for the device, once for each time.

    On a GPU torch itself says so. On a CPU the reads are counted; their modes would keep torch from compiling
    FlexAttention on a GPU.
    """
    found: list[str] = []
    if spot.dry:
        with HostReads() as reads:
            yield found
        found += [name.split(":")[0] for name in reads.counts.elements() if not name.startswith(CPU_ONLY)]
        return
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        ours = warning.filename.startswith(f"{ROOT}/gdrt_ds/")
        if ours and "synchronizing" in str(warning.message):
            found.append(Path(warning.filename).name)


def rows_of(spot: Spot, way: str, found: dict) -> list[Row]:
    lines = [line for line in found["told"].splitlines() if line.startswith("attention:")]
    rate = found["tokens"] / found["seconds"]
    rows = [
        Row(f"{way}: what is announced", "; ".join(lines)),
        same(f"{way}: files that wait for the device in a step", found["waits"], ["buffer.py"]),
        Row(f"{way}: a step of {found['tokens']} tokens", f"{found['seconds']:.3f} s, {rate:,.0f} tokens/s"),
    ]
    if spot.dry:
        return rows
    ratio = found["peak"] / found["planned"]
    figures = f"{found['peak'] / 2**30:.2f} of {found['planned'] / 2**30:.2f} GiB planned"
    rows.append(Row(f"{way}: peak memory, {spot.layers} layers", figures, "60 to 110 %", 0.6 <= ratio <= 1.1))
    return rows
