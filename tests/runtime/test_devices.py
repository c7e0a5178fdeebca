"""Which device a process takes and in which dtype it computes, for machines that this one is not.

torch's answers about GPUs are replaced by those of the machine in question; nothing of ours is.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gdrt_ds.errors import UserError
from gdrt_ds.loss.head import product_dtype
from gdrt_ds.models.source import compute_dtype, dtype_line
from gdrt_ds.runtime import Runtime, cpu_products, device_of_rank, name_accelerator, to_device
from gdrt_ds.runtime.cpu_products import bfloat16_products
from gdrt_ds.runtime.starting import complete_rendezvous

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes torch answer as on a machine with these GPUs."""

    def put(count: int, name: str = "NVIDIA H100", capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)

    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(variable, "unset")  # remembered, so that it is restored
        monkeypatch.delenv(variable)
    return put


@pytest.mark.parametrize(
    "visible, local_rank, number",
    [(8, 3, 3), (1, 3, 0), (2, 3, 1), (8, 0, 0)],
    ids=["all GPUs seen", "one GPU bound to each task", "two seen by each task", "the first rank"],
)
def test_deepspeed_is_told_the_number_of_the_device_and_not_of_the_task(gpus, visible, local_rank, number):
    gpus(visible)
    device = device_of_rank(local_rank)
    assert device == torch.device("cuda", number)
    complete_rendezvous(Runtime(rank=local_rank, local_rank=local_rank, world=8, device=device))
    assert os.environ["LOCAL_RANK"] == str(number)
    assert os.environ["RANK"] == str(local_rank)


def test_without_a_gpu_the_local_rank_stays_the_local_rank(gpus):
    gpus(0)
    device = device_of_rank(3)
    assert device == torch.device("cpu")
    complete_rendezvous(Runtime(rank=3, local_rank=3, world=8, device=device))
    assert os.environ["LOCAL_RANK"] == "3"


def test_the_accelerator_is_what_torch_can_use_unless_the_user_names_one(gpus, monkeypatch):
    gpus(0)
    assert name_accelerator() == os.environ["DS_ACCELERATOR"] == "cpu"
    gpus(1)
    assert name_accelerator() == "cpu"  # it was named
    monkeypatch.delenv("DS_ACCELERATOR")
    assert name_accelerator() == os.environ["DS_ACCELERATOR"] == "cuda"


def test_no_file_of_the_project_asks_a_device_file_or_a_command_for_gpus():
    asked = []
    for folder in ("gdrt_ds", "eval", "benchmarks", "slurm"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in (".py", ".sh"):
                continue
            text = path.read_text(encoding="utf-8")
            asked += [(path.name, word) for word in ("/dev/nvidia", "nvidia-smi") if word in text]
    assert asked == []


@pytest.mark.parametrize(
    "name, capability, dtype",
    [
        ("NVIDIA H100", (9, 0), torch.bfloat16),
        ("NVIDIA A100", (8, 0), torch.bfloat16),
        ("Tesla T4", (7, 5), torch.float16),
        ("Tesla V100", (7, 0), torch.float16),
    ],
)
def test_auto_computes_in_bfloat16_only_where_the_gpu_does(gpus, name, capability, dtype):
    gpus(1, name, capability)
    assert compute_dtype("auto", CUDA) == dtype
    assert compute_dtype("float32", CUDA) == torch.float32


AVX, AMX = "_is_avx512_bf16_supported", "_is_amx_tile_supported"


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """A function that makes torch answer as on a processor with these instructions and this speed."""

    def put(supported: set[str], speedup: float) -> None:
        monkeypatch.setenv("GDRT_CACHE", str(tmp_path))
        for probe in (AVX, AMX):
            monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: probe in supported)
        monkeypatch.setattr(cpu_products, "measured_speedup", lambda: speedup)
        bfloat16_products.cache_clear()
        product_dtype.cache_clear()

    yield put
    bfloat16_products.cache_clear()
    product_dtype.cache_clear()


@pytest.mark.parametrize(
    "supported, speedup, dtype, words",
    [
        ({AVX}, 2.2, torch.bfloat16, "by AVX512_BF16 this CPU multiplies bfloat16 at 2.2 x"),
        ({AVX, AMX}, 6.0, torch.bfloat16, "by AMX this CPU multiplies bfloat16 at 6.0 x"),
        ({AVX}, 0.5, torch.float32, "at 0.5 x the speed of float32"),
        (set(), 3.0, torch.float32, "neither AVX512_BF16 nor AMX"),
    ],
    ids=["fast AVX512_BF16", "AMX", "AVX512_BF16 at half speed", "neither"],
)
def test_auto_computes_in_bfloat16_only_where_the_processor_is_faster_in_it(
    supported, speedup, dtype, words, processor
):
    processor(supported, speedup)
    line = dtype_line("auto", CPU)
    assert compute_dtype("auto", CPU) == dtype
    assert str(dtype).removeprefix("torch.") in line and words in line
    assert product_dtype(torch.bfloat16, "cpu")[0] == dtype
    assert compute_dtype("float32", CPU) == torch.float32
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16  # asked for by name: slow, but as asked
    told = dtype_line("bfloat16", CPU)
    assert ("auto would take float32" in told) == (dtype == torch.float32)
    assert dtype == torch.bfloat16 or words in told
    assert "auto" not in dtype_line("float32", CPU)


def test_the_processor_is_measured_once_and_every_process_reads_that(processor, tmp_path):
    processor({AVX}, 2.0)
    assert compute_dtype("auto", CPU) == torch.bfloat16
    processor({AVX}, 0.5)  # another process, at a moment when the machine was busy
    assert compute_dtype("auto", CPU) == torch.bfloat16
    (kept,) = tmp_path.glob("cpu-products-*.json")
    kept.write_text("torn {")
    processor({AVX}, 0.5)
    assert compute_dtype("auto", CPU) == torch.float32


def test_the_measured_speed_is_that_of_the_products():
    speedup = cpu_products.measured_speedup()
    assert 0.01 < speedup < 100


def test_bfloat16_on_a_gpu_that_emulates_it_is_refused_by_name(gpus):
    gpus(1, "Tesla V100-SXM2-16GB", (7, 0))
    with pytest.raises(UserError) as refused:
        compute_dtype("bfloat16", CUDA)
    assert refused.value.problem == (
        "model.dtype = bfloat16, but Tesla V100-SXM2-16GB (compute capability 7.0) does not compute in "
        "bfloat16"
    )
    assert refused.value.fix == "set model.dtype to auto or float16"
    gpus(1)
    assert compute_dtype("bfloat16", CUDA) == torch.bfloat16


def test_a_plan_for_a_gpu_that_is_not_here_is_made_for_one_of_todays(gpus):
    gpus(0)
    assert compute_dtype("auto", CUDA) == torch.bfloat16


def test_values_of_the_host_reach_a_cpu_unchanged_and_without_a_copy():
    array = np.arange(6)
    moved = to_device(array, "cpu")
    assert moved.tolist() == array.tolist()
    array[0] = 9
    assert moved[0] == 9
    assert to_device(array[::2], torch.device("cpu")).tolist() == [9, 2, 4]
