"""`--plan --gpu-memory` plans for GPUs that this machine does not have: their dtype, and whether it fits."""

from __future__ import annotations

import pytest
import torch

from gdrt_ds import train
from gdrt_ds.commands.train import split_words
from gdrt_ds.config import load_config
from gdrt_ds.files import REPOSITORY
from gdrt_ds.planning.plan import plan_run, planned_device
from gdrt_ds.training.preparation import prepare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="plans for a GPU on a machine without one")
SMOKE = str(REPOSITORY / "configs" / "smoke.yaml")
WORDS = ["--config", SMOKE, "model.dtype=auto", "model.quantization=nf4", "--plan", "--world", "2"]


def told(capsys, *words: str) -> tuple[int, str]:
    """Exit status and output of a plan."""
    try:
        status = train.main([*WORDS, *words])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_plan_is_for_the_named_gpu_and_not_for_this_processor(tmp_path, capsys):
    folder = f"run.dir={tmp_path / 'run'}"
    status, here = told(capsys, folder)
    assert status == 0 and "of it for tensors" not in here and "the device has" not in here
    status, there = told(capsys, folder, "--gpu-memory", "80")
    assert status == 0, there
    assert "the device has 80.00 GiB" in there
    assert "dtype: bfloat16 (model.dtype=auto: GPUs from Ampere on compute in bfloat16)" in there
    assert "glibc" not in there  # advice about a processor's memory


def test_what_does_not_fit_into_the_named_gpu_is_told_with_the_way_out(tmp_path):
    config = load_config(SMOKE, [f"run.dir={tmp_path / 'run'}"])
    prepared = prepare(config)
    roomy = plan_run(config, prepared, 2, planned_device(80)).memory
    tight = plan_run(config, prepared, 2, planned_device(1e-6)).memory
    assert not roomy.advice and tight.advice
    assert roomy.peak_bytes == tight.peak_bytes


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_gpu_without_memory_is_refused(value, tmp_path, capsys):
    status, text = told(capsys, f"run.dir={tmp_path / 'run'}", f"--gpu-memory={value}")
    assert status == 2 and "--gpu-memory" in text and "a positive number of GiB" in text


def test_a_quantisation_that_needs_a_gpu_can_be_planned_without_one(tmp_path, capsys):
    words = [f"run.dir={tmp_path / 'run'}", "model.attention=flash_attention_2"]
    status, text = told(capsys, *words)
    assert status == 2 and "flash_attention_2" in text
    _, text = told(capsys, *words, "--gpu-memory", "80")
    assert "needs a GPU" not in text and "on cpu" not in text


def test_the_option_goes_through_the_command_that_starts_ranks():
    assert split_words(["--num_gpus", "2", "--plan", "--gpu-memory", "80"]) == (
        ["--num_gpus", "2"],
        ["--plan", "--gpu-memory", "80"],
    )
