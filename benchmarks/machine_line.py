"""Where a figure was measured: one line for every benchmark's output."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """GPU name, or processor, threads, cores and the load that other work puts on them; torch version."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        name = next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            name,
        )
    return (
        f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch "
        f"{torch.__version__}"
    )
