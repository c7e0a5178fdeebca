"""What a machine has: facts only, no judgement (that is gdrt_ds/planning/diagnosis.py).

It must answer on a machine where something is broken. So nothing but the standard library is imported before
it is known to be there, and what cannot be found out is None.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import re
import shutil
import socket
import struct
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from gdrt_ds import __version__
from gdrt_ds.files import REPOSITORY, in_checkout

SLURM_COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "sacct")
ADDRESS_OF_INTERFACE = 0x8915
"""SIOCGIFADDR of <linux/sockios.h>: the IPv4 address of a network interface."""
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Flags of /proc/cpuinfo that decide how fast a CPU computes; the last two are bfloat16 products."""


def describe_machine(run_folder: Path, cache: Path) -> dict[str, Any]:
    """Returns everything that is known of this machine, as a JSON tree.

    Args:
        run_folder: where runs are to be written.
        cache: the cache folder of the package.
    """
    return {
        "gdrt_ds": {"version": __version__, "folder": str(REPOSITORY), "checkout": in_checkout()},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": platform.platform(),
        "packages": packages(),
        "gpus": gpus(),
        "nvidia_driver": Path("/proc/driver/nvidia/version").exists(),
        "cpu": cpu(),
        "memory": memory(),
        "disks": [
            disk("run folder", run_folder),
            disk("cache", cache),
            disk("shared memory", Path("/dev/shm")),
        ],
        "compiler": shutil.which("c++") or shutil.which("g++"),
        "ninja": shutil.which("ninja", path=_path_with_environment()),
        "network": interfaces(),
        "host": host(),
        "slurm": {name: shutil.which(name) for name in SLURM_COMMANDS},
    }


def packages() -> list[dict[str, Any]]:
    """Returns the requirements of the package: name, the range that is supported, what is installed.

    `extra` is None for what every run needs. The list is empty where gdrt_ds itself was never installed.
    """
    try:
        wanted = metadata.requires("gdrt-ds") or []
    except metadata.PackageNotFoundError:
        return []
    from packaging.requirements import Requirement

    rows = []
    for requirement in map(Requirement, wanted):
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", str(requirement.marker or ""))
        if extra is None and requirement.marker is not None and not requirement.marker.evaluate():
            continue
        rows.append(
            {
                "name": requirement.name,
                "supported": str(requirement.specifier) or "any",
                "installed": installed_version(requirement.name),
                "fits": _fits(requirement),
                "extra": extra and extra.group(1),
            }
        )
    return rows


def installed_version(name: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(requirement: Any) -> bool:
    version = installed_version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def gpus() -> list[dict[str, Any]] | None:
    """Returns the GPUs that torch can use; None where torch cannot be asked."""
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        import torch
    except (ImportError, OSError):
        return None
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": about.name,
                "capability": f"{about.major}.{about.minor}",
                "memory_bytes": about.total_memory,
                "driver_runtime": torch.version.cuda or torch.version.hip,
            }
        )
    return found


def cpu() -> dict[str, Any]:
    """Returns the model of the CPU, the cores that this process may use, and flags that matter."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    words = set(flags.group(1).split()) if flags else set()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model.group(1) if model else platform.machine(),
        "cores": cores,
        "flags": [flag for flag in CPU_FLAGS if flag in words],
    }


def memory() -> dict[str, int | None]:
    """Returns bytes of the host's memory: in all, and what new work can have."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return {"total_bytes": found.get("MemTotal"), "available_bytes": found.get("MemAvailable")}


def disk(purpose: str, folder: Path) -> dict[str, Any]:
    """Returns the free bytes of a folder's file system and whether we may write there.

    The folder need not exist: its nearest parent that does is asked.
    """
    folder = folder.absolute()
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
    if there is None or not there.is_dir():
        return {"purpose": purpose, "folder": str(folder), "free_bytes": None, "writable": False}
    return {
        "purpose": purpose,
        "folder": str(folder),
        "free_bytes": shutil.disk_usage(there).free,
        "writable": os.access(there, os.W_OK | os.X_OK),
    }


def interfaces() -> list[dict[str, str]]:
    """Returns the network interfaces with an IPv4 address: NCCL and gloo choose among them."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), ADDRESS_OF_INTERFACE, request)
            except OSError:
                continue  # it has no IPv4 address
            found.append({"name": name, "address": socket.inet_ntoa(answer[20:24])})
    return found


def host() -> dict[str, str | None]:
    """Returns the name of the machine and the address that this name stands for."""
    name = socket.gethostname()
    try:
        return {"name": name, "address": socket.gethostbyname(name)}
    except OSError:
        return {"name": name, "address": None}


def _path_with_environment() -> str:
    """PATH with the folder of this interpreter: an environment may be used without being activated."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
