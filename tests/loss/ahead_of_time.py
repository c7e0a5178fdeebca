"""Compiles the Triton kernels for GPUs that are not here and lists registers and spills: python
tests/loss/ahead_of_time.py

One JSON object per kernel and architecture. Run by test_kernels.py in a process of its own, because a
process that interprets kernels (TRITON_INTERPRET=1) cannot compile them.
"""

import json
import os
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gdrt_ds.loss import kernels


def signatures(logits: str) -> list[tuple[str, dict, dict]]:
    """(kernel, argument types, constants) as a head of dtype `logits` launches them."""
    rows = {"row_stride": "i32", "num_columns": "i32", "gain": "fp32", "cap_gain": "fp32"}
    block = {"BLOCK": kernels.COLUMN_BLOCK}
    cases = []
    for cap in (False, True):
        finish = {
            "logits_ptr": logits,
            "columns_ptr": "*i64",
            "losses_ptr": "*fp32",
            "highest_ptr": "*fp32",
            "log_total_ptr": "*fp32",
        }
        cases.append(
            (
                "finish_rows_kernel",
                {**finish, **rows, "slope": "fp32"},
                {"HAS_CAP": cap, "KEEP_INF": cap, **block},
            )
        )
        extend = {
            "logits_ptr": logits,
            "labels_ptr": "*i64",
            "highest_ptr": "*fp32",
            "total_ptr": "*fp32",
            "target_ptr": "*fp32",
        }
        cases.append(("extend_rows_kernel", {**extend, **rows, "first": "i32"}, {"HAS_CAP": cap, **block}))
        grad = {
            "logits_ptr": logits,
            "labels_ptr": "*i64",
            "highest_ptr": "*fp32",
            "log_total_ptr": "*fp32",
            "coefficient_ptr": "*fp32",
        }
        cases.append(
            ("gradient_kernel", {**grad, **rows, "first": "i32"}, {"HAS_CAP": cap, "KEEP_INF": cap, **block})
        )
    sums = {"losses_ptr": "*fp32", "groups_ptr": "*i64", "sums_ptr": "*fp64", "num_tokens": "i32"}
    return [*cases, ("group_sums_kernel", sums, {"BLOCK": kernels.TOKEN_BLOCK})]


def compile_one(name: str, arguments: dict, constants: dict, capability: int) -> dict:
    function = getattr(kernels, name)
    signature = {n: "constexpr" if n in constants else arguments[n] for n in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.NUM_WARPS}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(compiled.asm["ptx"])
        arch = re.search(r"^\.target\s+(\S+?)\b", compiled.asm["ptx"], re.M).group(1)
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name={arch}",
            path,
            "-o",
            os.path.join(folder, "kernel.cubin"),
        ]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return {
        "kernel": name,
        "arch": arch,
        "logits": arguments.get("logits_ptr", ""),
        "constants": constants,
        "cubin_bytes": len(compiled.asm["cubin"]),
        "registers": int(re.search(r"Used (\d+) registers", listing).group(1)),
        "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", listing)),
    }


if __name__ == "__main__":
    for capability in (80, 90):
        for logits in ("*bf16", "*fp32"):
            for name, arguments, constants in signatures(logits):
                print(json.dumps(compile_one(name, arguments, constants, capability)), flush=True)
