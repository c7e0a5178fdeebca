"""The Triton kernels: numerics in Triton's interpreter on the CPU, and compilation for GPUs that are not
here.

A process either interprets kernels (TRITON_INTERPRET=1, read when triton is imported) or compiles them, so
each half runs in its own.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent

if importlib.util.find_spec("triton") is None:
    pytest.skip(
        "triton is not installed: the kernels can be neither interpreted nor compiled; `pip install "
        "triton==3.7.1` beside a CPU torch",
        allow_module_level=True,
    )


def _python(script: str, tmp_path, **environment) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, str(HERE / script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, str]:
    """What interpret.py found: name of the check -> "ok" or the failure."""
    lines = _python("interpret.py", tmp_path_factory.mktemp("interpreted"), TRITON_INTERPRET="1").splitlines()
    return {
        row["check"]: row["result"]
        for row in map(json.loads, (line for line in lines if line.startswith("{")))
    }


@pytest.mark.parametrize(
    "check",
    [
        "float32 is no worse than plain",
        "bfloat16 is no worse than plain",
        "trained heads",
        "odd vocabularies and chunks",
        "extreme logits",
        "allowed tokens with soft-cap",
        "sums are sums of token losses",
        "K-th log-probability",
        "no tokens",
        "bitwise repeatable",
        "group sums of many tokens",
        "a planted error in the kernel is found",
        "float64 is refused",
    ],
)
def test_interpreted_kernels_agree_with_the_reference(interpreted, check):
    assert interpreted[check] == "ok"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    output = _python("ahead_of_time.py", tmp_path_factory.mktemp("compiled"), TRITON_INTERPRET="0")
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_every_kernel_compiles_for_sm_80_and_sm_90_without_spills(compiled):
    for arch in ("sm_80", "sm_90"):
        rows = [row for row in compiled if row["arch"].startswith(arch)]
        assert {row["kernel"] for row in rows} == {
            "finish_rows_kernel",
            "extend_rows_kernel",
            "gradient_kernel",
            "group_sums_kernel",
        }
        for row in rows:
            use = f"{row['registers']} registers, {row['spill_bytes']} bytes spilled"
            print(f"{arch} {row['kernel']:20} {row['logits']:6} {use}, {row['constants']}")
            assert row["cubin_bytes"] > 1000 and row["spill_bytes"] == 0
            assert (
                row["registers"] <= 128
            )  # 8 warps x 32 x 128 = half of a multiprocessor's 65,536: two programs at once


def test_without_the_interpreter_cpu_tensors_are_refused_with_the_reason(tmp_path):
    output = _python("refuse.py", tmp_path, TRITON_INTERPRET="0")
    assert "TRITON_INTERPRET=1" in output and "implementation='triton'" in output
