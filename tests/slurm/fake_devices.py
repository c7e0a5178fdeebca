"""A rank whose torch answers as on a node with GPUs: it sees those of CUDA_VISIBLE_DEVICES, as Slurm set it.

    python tests/slurm/fake_devices.py FOLDER

The devices are fake and compute nothing, so NCCL becomes gloo. Everything else is the trainer's own start:
which device a rank takes, what DeepSpeed is told, and the rendezvous. Each rank writes what it found to
FOLDER/rank_N.json.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gdrt_ds.runtime import start_runtime


def visible() -> list[str]:
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]


def set_device(device: torch.device | int) -> None:
    """Refuses a device that this process does not see, with the driver's words."""
    number = torch.device("cuda", device).index if isinstance(device, int) else device.index
    if number >= len(visible()):
        raise RuntimeError(f"CUDA error: invalid device ordinal {number}, of {len(visible())} visible")


def fake_the_driver() -> None:
    real_group = dist.init_process_group

    def group(backend: str | None = None, **options):
        options.pop("device_id", None)
        return real_group("gloo" if backend == "nccl" else backend, **options)

    torch.cuda.is_available = lambda: bool(visible())
    torch.cuda.device_count = lambda: len(visible())
    torch.cuda.set_device = set_device
    dist.init_process_group = group


def main(folder: Path) -> None:
    os.environ.pop("DS_ACCELERATOR", None)  # sbatch hands on that of the tests, which run on a CPU
    fake_the_driver()
    runtime = start_runtime(timeout_s=120)
    joined = torch.ones(1)
    dist.all_reduce(joined)
    found = {
        "rank": runtime.rank,
        "node": socket.gethostname(),
        "local_rank": runtime.local_rank,
        "visible": visible(),
        "device": str(runtime.device),
        "told_deepspeed": os.environ["LOCAL_RANK"],
        "accelerator": os.environ["DS_ACCELERATOR"],
        "ranks_met": int(joined),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank_{runtime.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
