"""Which accelerator and which device a process has, and how values get from the host onto it.

torch is asked, never a device file: a container can have the file without a driver that works, and a
build of torch without CUDA can stand beside one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def name_accelerator() -> str:
    """Tells DeepSpeed its accelerator (DS_ACCELERATOR), unless the user has; call it before importing it.

    Without the variable DeepSpeed looks for installed packages instead, and takes CUDA's names on a machine
    whose torch cannot use a GPU.

    Returns:
        `cuda`, `cpu`, or what the variable says.
    """
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return os.environ.setdefault("DS_ACCELERATOR", found)


def device_of_rank(local_rank: int) -> torch.device:
    """Returns the device of a rank: its GPU among those that this process sees, else the CPU.

    Args:
        local_rank: the rank's number among those of its machine. Slurm can bind one GPU to each task; every
            task then sees one device, which is number 0 whatever its local rank is.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that new tensors of a device can take, over all processes that use it.

    On a CPU that is what the kernel calls available, or less where the control group of the process has less
    left (a container, a Slurm job).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        kib = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
        found += [int(kib.group(1)) * 1024] if kib else []
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file():
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        found += [max(0, int(limit) - used)] if limit != "max" else []
    # Neither exists outside Linux: then half of the memory is taken for free.
    return min(found, default=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)


def to_device(values: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """Returns values of the host on a device, without waiting for the copy.

    Only a copy from page-locked memory is asynchronous: from other memory the driver stages it, and torch
    waits for all work that was queued before. torch keeps the page-locked block until the copy is done.
    """
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(values))
    device = torch.device(device)
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
