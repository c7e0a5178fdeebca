"""Whether this CPU multiplies bfloat16 matrices faster than float32 ones: asked of the CPU, then measured.

Instructions alone do not decide it. AVX512_BF16 doubles the speed on some processors. On those whose fast
bfloat16 unit is AMX it runs at half the speed of float32 products where a virtual machine hides AMX.
So the product itself is timed once per machine, and the answer is kept in the cache folder: every process
and every rank of the machine then computes in the same dtype.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
from pathlib import Path

import torch

from gdrt_ds.errors import UserError
from gdrt_ds.files import cache_folder, process_lock, write_json

WORTH_IT = 1.2
"""bfloat16 has to be this much faster: below it, its rounding is not worth the time."""
ROWS, WIDTH = 512, 1024
"""Sizes of the timed product: a short row of tokens and a small model's layer, about 1 GFLOP."""
REPETITIONS = 7


@functools.cache
def bfloat16_products() -> tuple[bool, str]:
    """Returns whether bfloat16 pays on this CPU, and a clause that says why."""
    instructions = bfloat16_instructions()
    if not instructions:
        return False, "this CPU has neither AVX512_BF16 nor AMX"
    speedup = kept_speedup()
    clause = (
        f"by {instructions} this CPU multiplies bfloat16 at {speedup:.1f} x the speed of float32, measured"
    )
    return speedup >= WORTH_IT, clause


def bfloat16_instructions() -> str:
    """Returns the instructions for bfloat16 products that torch found; an empty text if there are none."""
    # torch gives no public name to what it found; a build without these functions is for no x86 processor.
    probes = (("AMX", "_is_amx_tile_supported"), ("AVX512_BF16", "_is_avx512_bf16_supported"))
    for instructions, probe in probes:
        if getattr(torch.cpu, probe, lambda: False)():
            return instructions
    return ""


def kept_speedup() -> float:
    """Returns the speed of bfloat16 products over float32's, measured once per processor and torch.

    A cache folder that cannot be used only means that it is measured again.
    """
    name = f"cpu-products-{_processor()}.json"
    try:
        path = cache_folder() / name
        with process_lock(path.with_suffix(".lock")):
            return _read_or_measure(path)
    except (OSError, UserError):
        return measured_speedup()


def _read_or_measure(path: Path) -> float:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["bfloat16_speedup"])
    except (OSError, ValueError, KeyError, TypeError):
        speedup = measured_speedup()
        write_json(path, {"bfloat16_speedup": speedup, "torch": torch.__version__})
        return speedup


def measured_speedup() -> float:
    """Times one product in both dtypes, in turns. The best of each counts: a busy machine matters little."""
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    factors = {
        dtype: (torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype))
        for dtype in seconds
    }
    with torch.inference_mode():
        for _ in range(REPETITIONS):
            for dtype, (tokens, weight) in factors.items():
                started = time.perf_counter()
                torch.nn.functional.linear(tokens, weight)
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _processor() -> str:
    """A short name of this processor, its features and this torch."""
    words = [platform.machine(), platform.processor(), torch.__version__]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    kept = ("vendor_id", "cpu family", "model", "stepping", "flags")
    words += [line for line in lines if line.startswith(kept)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
