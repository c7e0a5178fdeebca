"""Trains a model in the shape of Llama-3-8B, or as many layers of the 70B shape as fit, on the ranks of here.

    python benchmarks/large_model.py [--shape llama3-8b] [--layers N] [--world 2] [--data ml-100k] [--json]

The weights are random and written layer by layer. Everything else is the real command: `deepspeed
gdrt_ds/train.py`, sharded NF4 loading, LoRA, real windows, three sft steps and three gdrt steps. While
it runs, the proportional set size of every rank is read once a second: shared pages count once, divided
by those who share them. The peak per rank and the peak of the sum stand beside what `--plan` predicts.

Minutes of two cores and 16 GB of disk for 8B. tcmalloc is preloaded where it is installed, because glibc's
allocator keeps freed tensors (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launching import find_allocator, trainer_command, trainer_environment  # noqa: E402
from machine_line import machine  # noqa: E402
from random_model import SHAPES, write_random_model  # noqa: E402

SETTINGS = [
    "prompt.template=alpaca",
    "prompt.max_length=256",
    "data.limit_train=12",
    "data.limit_valid=2",
    "model.quantization=nf4",
    "model.dtype=bfloat16",
    "model.gradient_checkpointing=true",
    "model.lora={r: 8, alpha: 16, dropout: 0.0, targets: all-linear}",
    "train.global_batch=2",
    "train.micro_batch=1",
    "train.max_steps=3",
    "train.warmup_steps=0",
    "train.eval_every=3",
    "train.log_every=1",
    "train.timeout_s=3600",
    "groups.num=4",
    "groups.by=position",  # scoring every title with the model would take longer than the steps
    "deepspeed=ds_configs/cpu.json",
]


class ProportionalSetSize(threading.Thread):
    """Reads the proportional set size of every rank below a process, once a second."""

    def __init__(self, parent: int):
        super().__init__(daemon=True)
        self.parent = parent
        self.ended = threading.Event()
        self.peak_of: dict[int, int] = {}
        self.peak_sum = 0

    def run(self) -> None:
        while not self.ended.wait(1.0):
            now = {pid: pss_bytes(pid) for pid in ranks_below(self.parent)}
            for pid, size in now.items():
                self.peak_of[pid] = max(size, self.peak_of.get(pid, 0))
            self.peak_sum = max(self.peak_sum, sum(now.values()))


def ranks_below(parent: int) -> list[int]:
    """Process ids of the training ranks that descend from a process."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:  # it has ended
            continue
        parents[int(status.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found = []
    for pid in parents:
        ancestor = pid
        while ancestor not in (0, parent):
            ancestor = parents.get(ancestor, 0)
        if ancestor == parent and _is_rank(pid):
            found.append(pid)
    return found


def _is_rank(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(word.endswith(b"gdrt_ds/train.py") for word in words) and any(
        word.startswith(b"--local_rank") for word in words
    )


def pss_bytes(pid: int) -> int:
    """Returns the proportional set size of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def train(model: Path, objective: str, folder: Path, options) -> dict:
    """Runs the real command; returns its losses, its memory and what the plan says."""
    from gdrt_ds.config import load_config
    from gdrt_ds.planning.plan import plan_run
    from gdrt_ds.training.preparation import prepare

    overrides = [
        f"run.dir={folder}",
        f"model.path={model}",
        f"data.path={options.data}",
        f"objective={objective}",
        *SETTINGS,
    ]
    preload = find_allocator()
    command = trainer_command(options.world, overrides)
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=trainer_environment(preload),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watch = ProportionalSetSize(process.pid)
    watch.start()
    output = ""
    for line in process.stdout:
        output += line
        print(line, end="", file=sys.stderr, flush=True)
    process.wait()
    watch.ended.set()
    watch.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{output[-6000:]}")
    config = load_config(None, overrides)
    plan = plan_run(config, prepare(config), options.world)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    steps = [record["step_s"] for record in records]
    return {
        "losses": [record["loss"] for record in records],
        "group_weights": [record.get("group_weight") for record in records],
        "planned_bytes": plan.memory.peak_bytes,
        "seen_bytes": summary["peak_memory_bytes"],
        "pss_per_rank": sorted(watch.peak_of.values(), reverse=True),
        "pss_sum": watch.peak_sum,
        "step_share_of_run": sum(steps) / (time.monotonic() - started),
        "allocator": preload or "glibc",
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama3-8b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--objectives", nargs="+", default=["sft", "gdrt"])
    parser.add_argument("--model", type=Path, help="where the random model is kept (default: a new folder)")
    parser.add_argument("--limit-gib", type=float, default=20.0, help="most memory of all ranks together")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two layers of the small shape")
    options = parser.parse_args()
    if options.quick:
        options.shape = "small"
        options.layers = 2
    os.chdir(ROOT)
    kept = True
    with tempfile.TemporaryDirectory() as scratch:
        model = write_random_model(options.model or Path(scratch) / "model", options.shape, options.layers)
        for objective in options.objectives:
            found = train(model, objective, Path(scratch) / objective, options)
            ratio = found["planned_bytes"] / found["seen_bytes"]
            fits = found["pss_sum"] <= options.limit_gib * 2**30
            kept = kept and fits and (options.quick or abs(ratio - 1) <= 0.25)
            if options.json:
                record = {
                    "name": f"large_model: {options.shape}, {options.layers or 'all'} layers, {objective}",
                    "world": options.world,
                    "ours": found["planned_bytes"],
                    "peer": found["seen_bytes"],
                    "ratio": round(ratio, 3),
                    **found,
                    "machine": machine(),
                }
                print(json.dumps(record), flush=True)
                continue
            ranks = ", ".join(f"{size / 2**30:.2f}" for size in found["pss_per_rank"])
            print(
                f"{options.shape}, {options.layers or SHAPES[options.shape]['num_hidden_layers']} layers, "
                f"{objective}: losses {', '.join(f'{loss:.4f}' for loss in found['losses'])}; "
                f"proportional set size {ranks} GiB, together at most {found['pss_sum'] / 2**30:.2f}; plan "
                f"{found['planned_bytes'] / 2**30:.2f}, seen {found['seen_bytes'] / 2**30:.2f} GiB per rank "
                f"({ratio:.2f}); allocator {found['allocator']}",
                flush=True,
            )
    if not options.json:
        print(machine())
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
