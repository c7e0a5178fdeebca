"""Ranks behind test_checkpoint_ranks.py.

Straight and resumed runs at several stages and world sizes, a full disk, a late process, nodes that see other
files.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from gdrt_ds.dro import relevance
from gdrt_ds.errors import UserError
from gdrt_ds.runtime import Runtime
from gdrt_ds.training import checkpoint, grouping, lives
from gdrt_ds.training.adapter import save_adapter
from gdrt_ds.training.job import on_main_rank
from tests.distributed import engines
from tests.distributed.ranks import run_ranks

CLIENT = {
    "dro": {"ema": torch.arange(3, dtype=torch.float64) / 7, "steps": 3},
    "data": {"position": 17, "order": [3, 1, 2]},
}


def straight(rank, world, stage, model, run, total, save_at, dtype="float32"):
    torch.manual_seed(rank)
    loaded = engines.load(model, rank, world, stage, dtype=dtype)
    engine = engines.start(loaded, stage, world, dtype)
    losses = engines.train_steps(engine, rank, world, 0, save_at)
    life = lives.begin_life(run) if rank == 0 else 1
    checkpoint.save(engine, run, save_at, client_state=CLIENT, life=life, fingerprint=loaded.fingerprint)
    losses += engines.train_steps(engine, rank, world, save_at, total)
    return losses, engines.trainable_state(engine), engine.lr_scheduler.get_last_lr(), engine.global_steps


def resumed(rank, world, stage, model, run, total, dtype="float32"):
    torch.manual_seed(99 + rank)  # restored by the checkpoint: dropout masks go on where they were
    loaded = engines.load(model, rank, world, stage, seed=7, dtype=dtype)
    engine = engines.start(loaded, stage, world, dtype)
    path, _ = checkpoint.resolve_resume(run, "auto")
    restored = checkpoint.load(engine, path, fingerprint=loaded.fingerprint)
    before = engines.trainable_state(engine)
    losses = engines.train_steps(engine, rank, world, restored.step, total)
    client = restored.client_state
    return dict(
        losses=losses,
        state=engines.trainable_state(engine),
        lr=engine.lr_scheduler.get_last_lr(),
        before=before,
        same=restored.same_world,
        client_ok=bool(
            torch.equal(client["dro"]["ema"], CLIENT["dro"]["ema"]) and client["data"] == CLIENT["data"]
        ),
        steps=engine.global_steps,
    )


def deepspeed_resumed(rank, world, stage, model, run):
    loaded = engines.load(model, rank, world, stage, seed=7)
    engine = engines.start(loaded, stage, world)
    path = checkpoint.find_latest_valid(run)
    engine.load_checkpoint(str(path), tag="deepspeed", load_module_strict=False)
    return engines.trainable_state(engine)


def faults(rank, world, model, run):
    """A full disk on one rank, then a process of an older life.

    Both refuse on every rank, the published one stays.
    """
    loaded = engines.load(model, rank, world, 3)
    engine = engines.start(loaded, 3, world)
    engines.train_steps(engine, rank, world, 0, 1)
    if rank == 0:
        lives.begin_life(run)
    torch.distributed.barrier()
    options = dict(client_state={"a": 1}, life=1, fingerprint=loaded.fingerprint)
    checkpoint.save(engine, run, 1, **options)
    messages = []
    own_bytes = (Path(run) / "checkpoints" / "step_1" / "rank_00001.safetensors").stat().st_size
    for limit, files in ((2000, False), (own_bytes + 100, True)):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            checkpoint.save(engine, run, 2, deepspeed_files=files, **options)
            messages.append("published")
        except UserError as error:
            messages.append(error.problem)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    torch.distributed.barrier()
    if rank == 0:
        lives.begin_life(run)
    torch.distributed.barrier()
    try:
        checkpoint.save(engine, run, 3, **options)
        messages.append("published")
    except UserError as error:
        messages.append(error.problem)
    wrong = None
    try:
        checkpoint.load(engine, checkpoint.find_latest_valid(run), fingerprint="0" * 64)
    except UserError as error:
        wrong = error.problem
    save_adapter(engine, Path(run) / "adapter")
    masters = engines.trainable_state(engine)
    return (
        messages,
        checkpoint.find_latest_valid(run).name,
        sorted(p.name for p in (Path(run) / "checkpoints").iterdir()),
        wrong,
        masters,
    )


def adapter(model, folder, masters):
    """Opens the saved adapter with PEFT alone on the plain base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)
    weights = {name: value for name, value in loaded.named_parameters() if "lora_" in name}
    lora_b = {name: value for name, value in weights.items() if "lora_B" in name}
    return {
        "lora_b": len(lora_b),
        "zero": sum(not bool(v.any()) for v in lora_b.values()),
        "unexpected": sorted(set(weights) ^ {name for name in masters if "|" not in name}),
        "equal_to_master_weights": all(torch.equal(weights[name], masters[name]) for name in weights),
    }


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def distance(a, b):
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def other_views(rank, world, folder):
    """What two ranks make of run folders and caches that hold something else on their nodes."""
    runtime = Runtime(rank=rank, local_rank=rank, world=world, local_world=world)
    job = SimpleNamespace(runtime=runtime, said=[])
    job.say = job.said.append
    (folder / f"node_{rank}").mkdir()
    found = {"step": on_main_rank(runtime, lambda: ("step_200", "step_100")[rank])}
    for name, error in (("refused", UserError("no such checkpoint", "name another")), ("broken", OSError(5))):

        def fail(error=error):
            raise error

        try:
            on_main_rank(runtime, fail)
        except Exception as seen:
            found[name] = f"{type(seen).__name__}: {seen}"
    os.environ["GDRT_CACHE"] = str(folder / f"node_{rank}")
    for name, tables in (("equal", ([1, 2], [1, 2])), ("differ", ([1, 2], [1, 3])), ("one", ([1, 2], None))):
        key = hashlib.sha256(name.encode()).hexdigest()
        if tables[rank] is not None:
            relevance.save_cached(grouping.relevance_cache(), key, np.array(tables[rank], dtype=np.float32))
        table = grouping._cached_on_every_rank(job, key, 2)
        found[name] = None if table is None else table.tolist()
    return found, job.said


def main(output, folder):
    folder = Path(folder)
    model, report = engines.tiny_folder(folder), {}
    for stage, world, dtype in ((3, 2, "float32"), (1, 2, "bfloat16"), (3, 1, "float32")):
        run = folder / f"run_{stage}_{world}_{dtype}"
        whole = run_ranks(world, straight, stage, model, run, 5, 3, dtype)
        parts = run_ranks(world, resumed, stage, model, run, 5, dtype)
        report[f"stage{stage}_world{world}_{dtype}"] = {
            "losses_equal": all(w[0][3:] == p["losses"] for w, p in zip(whole, parts)),
            "state_equal": all(equal(w[1], p["state"]) for w, p in zip(whole, parts)),
            "lr_equal": all(w[2] == p["lr"] for w, p in zip(whole, parts)),
            "steps_equal": all(w[3] == p["steps"] for w, p in zip(whole, parts)),
            "client_ok": all(p["client_ok"] for p in parts),
            "moved": distance(parts[0]["before"], parts[0]["state"]),
        }
        if (stage, world, dtype) == (3, 2, "float32"):
            other = run_ranks(3, resumed, 3, model, run, 3)
            report["other_world"] = {
                "state_equal": all(equal(parts[0]["before"], p["before"]) for p in other),
                "same": other[0]["same"],
            }
            other = run_ranks(1, resumed, 2, model, run, 3)
            report["other_stage_and_world"] = {"state_equal": equal(parts[0]["before"], other[0]["before"])}
            report["deepspeed_reads_its_files"] = equal(
                parts[0]["before"], run_ranks(2, deepspeed_resumed, 3, model, run)[0]
            )
    messages = run_ranks(2, faults, model, folder / "run_faults")
    report["faults"] = {
        "messages": [m[0] for m in messages],
        "latest": messages[0][1],
        "listing": messages[0][2],
        "wrong_base": messages[0][3],
    }
    report["adapter"] = adapter(model, folder / "run_faults" / "adapter", messages[0][4])
    report["other_views"] = run_ranks(2, other_views, folder)
    Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
