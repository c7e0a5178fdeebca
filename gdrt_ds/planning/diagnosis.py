"""What a run with default settings would use on this machine, what stands in its way, and what to do.

`choices` asks the same functions that a run asks. `findings` judges the facts of gdrt_ds/planning/machine.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LITTLE_DISK = 2 << 30
"""Free bytes below which a checkpoint of a small run may already fail."""
LITTLE_SHARED_MEMORY = 256 << 20
"""DeepSpeed's CPU ranks share 66 MiB each in /dev/shm; NCCL needs room there too."""
OPTIONAL = {
    "flash-attn": "rows of train.packing=packed and none use SDPA on GPUs; the default rows do not need it",
    "triton": "the group loss on GPUs is torch's, which is slower",
    "tensorboard": "log.tensorboard=true is refused",
    "wandb": "log.wandb=true is refused",
    "fastapi": "gdrt-serve does not start",
}
"""Packages that a run can do without, and what is different then."""


@dataclass(frozen=True)
class Finding:
    """One thing that is missing.

    Attributes:
        essential: no run with default settings would start.
        problem: what it is, with its value.
        fix: what to do.
    """

    essential: bool
    problem: str
    fix: str


def choices() -> tuple[dict[str, str], list[Finding]]:
    """Returns what the values `auto` of the settings mean here, and what failed when it was tried."""
    try:
        import torch

        from gdrt_ds.config import ModelSection
        from gdrt_ds.loss.implementations import choose
        from gdrt_ds.models.attention import choose_attention
        from gdrt_ds.models.source import compute_dtype, dtype_line
        from gdrt_ds.registry import find_part
        from gdrt_ds.runtime.devices import device_of_rank
    except (ImportError, OSError) as error:
        reason = f"a package of the training cannot be imported: {error}"
        return {}, [Finding(True, reason, "install the packages that are marked above")]
    device = device_of_rank(0)
    dtype = compute_dtype("auto", device)
    loss, why = choose("auto", device.type, dtype)
    model = ModelSection()
    quantization = find_part(
        "gdrt_ds.models.quantization", "QUANTIZATION", model.quantization, "model.quantization"
    )
    count = torch.cuda.device_count()
    chosen = {
        "device": f"{count} GPU(s), one rank each" if count else "cpu",
        "communication": "nccl" if count else "gloo",
        "dtype": dtype_line("auto", device).removeprefix("dtype: "),
        "attention": choose_attention("auto", device, dtype)[1].removeprefix("attention: "),
        "group loss": f"{loss} ({why})",
        "quantization": quantization.describe(model, dtype).removeprefix("base: "),
    }
    library, finding = try_four_bit(device)
    chosen["bitsandbytes"] = library
    found = [finding, without_default_model(model.path)]
    return chosen, [one for one in found if one is not None]


def without_default_model(path: str) -> Finding | None:
    """What is missing where the model of the default settings is not on this machine.

    It is no requirement of the package, and whoever has a model of their own can do without it.
    """
    from gdrt_ds.errors import UserError
    from gdrt_ds.models.built_in import SMOLLM2_NAME, find_smollm2

    if path != SMOLLM2_NAME:
        return None
    try:
        find_smollm2()
    except UserError as error:
        return Finding(False, error.problem, error.fix)
    return None


def try_four_bit(device: Any) -> tuple[str, Finding | None]:
    """Quantises a small matrix on the device and reads it back; says which library did it."""
    import torch

    try:
        import bitsandbytes
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        values = torch.linspace(-1.0, 1.0, 64 * 64, device=device).view(64, 64)
        packed, state = quantize_4bit(values, quant_type="nf4")
        error = (dequantize_4bit(packed, state) - values).abs().max().item()
    except Exception as error:  # whatever a broken native library raises is the answer here
        problem = f"4-bit weights do not work on {device.type} ({type(error).__name__}: {error})"
        fix = "install bitsandbytes for this machine, or set model.quantization=none"
        return "not usable", Finding(True, problem, fix)
    if error > 0.2:  # the widest gap between neighbours of NF4 is 0.30, so half of it bounds the error
        problem = f"4-bit weights come back wrong on {device.type}: they differ by {error:.2f} of their range"
        fix = "install another version of bitsandbytes, or set model.quantization=none"
        return "wrong results", Finding(True, problem, fix)
    return f"{bitsandbytes.__version__}, 4-bit weights work on {device.type} (tried)", None


def findings(machine: dict[str, Any]) -> list[Finding]:
    """Returns what is missing on a machine, the essential first."""
    found = [
        *_about_packages(machine),
        *_about_gpus(machine),
        *_about_building(machine),
        *_about_disks(machine),
        *_about_network(machine),
    ]
    return sorted(found, key=lambda finding: not finding.essential)


def _about_packages(machine: dict[str, Any]) -> list[Finding]:
    if not machine["packages"]:
        fix = "pip install the wheel, or make install in the checkout"
        return [Finding(False, "gdrt-ds is not installed, so its requirements are not known", fix)]
    found = []
    for row in machine["packages"]:
        name = row["name"]
        wish = f"pip install '{name}{row['supported'] if row['supported'] != 'any' else ''}'"
        if row["installed"] is None and row["extra"] is None:
            found.append(Finding(True, f"{name} is not installed", wish))
        elif row["installed"] is None and name in OPTIONAL:
            found.append(Finding(False, f"{name} is not installed: {OPTIONAL[name]}", wish))
        elif row["installed"] is not None and not row["fits"] and (row["extra"] is None or name in OPTIONAL):
            problem = f"{name} {row['installed']} is outside the supported range {row['supported']}"
            found.append(Finding(row["extra"] is None, problem, wish))
    # A package can stand in several extras.
    return list({finding.problem: finding for finding in found}.values())


def _about_gpus(machine: dict[str, Any]) -> list[Finding]:
    if machine["gpus"] or not machine["nvidia_driver"]:
        return []
    build = next((row["installed"] for row in machine["packages"] if row["name"] == "torch"), None)
    problem = f"there is an NVIDIA driver, but torch {build} sees no GPU: runs would use the CPU"
    fix = "install a build of torch for CUDA (its name ends in +cu...), and look at CUDA_VISIBLE_DEVICES"
    return [Finding(False, problem, fix)]


def _about_building(machine: dict[str, Any]) -> list[Finding]:
    """On CPUs DeepSpeed compiles its communication at the first start; on GPUs only offloading needs it."""
    on_cpu = not machine["gpus"]
    found = []
    if machine["compiler"] is None:
        problem = "there is no C++ compiler (c++ or g++), with which DeepSpeed builds its CPU extension"
        found.append(Finding(on_cpu, problem, "install one (Debian: apt-get install g++)"))
    if machine["ninja"] is None:
        problem = "the command ninja is not found, with which DeepSpeed builds its CPU extension"
        found.append(Finding(on_cpu, problem, "pip install ninja, and keep the environment's bin on PATH"))
    return found


def _about_disks(machine: dict[str, Any]) -> list[Finding]:
    found = []
    for row in machine["disks"]:
        shared = row["purpose"] == "shared memory"
        little = LITTLE_SHARED_MEMORY if shared else LITTLE_DISK
        if not row["writable"]:
            fix = "set run.dir (runs), or GDRT_CACHE (cache), to a folder that you may write"
            found.append(Finding(not shared, f"{row['purpose']}: {row['folder']} is not writable", fix))
        elif row["free_bytes"] < little:
            problem = f"{row['purpose']}: {row['folder']} has {row['free_bytes'] / 2**30:.1f} GiB free"
            fix = "give the container more shared memory (--shm-size)" if shared else "make room there"
            found.append(Finding(False, problem, fix))
    return found


def _about_network(machine: dict[str, Any]) -> list[Finding]:
    address = machine["host"]["address"]
    if address is not None and not address.startswith("127."):
        return []
    name = machine["host"]["name"]
    outside = [row["name"] for row in machine["network"] if not row["address"].startswith("127.")]
    problem = f"the name of this machine, {name}, stands for {address or 'no address'}"
    fix = (
        "matters for several machines only: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (Slurm templates: "
        f"GDRT_INTERFACE) to one of {', '.join(outside) or 'its interfaces'}"
    )
    return [Finding(False, problem, fix)]
