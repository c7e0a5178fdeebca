"""gdrt-doctor says what is missing, and its status says whether a run would start."""

from __future__ import annotations

import json

import pytest

from gdrt_ds.commands import doctor
from gdrt_ds.models import built_in
from gdrt_ds.planning import diagnosis
from gdrt_ds.planning.machine import describe_machine, disk


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    return describe_machine(folder / "runs", folder / "cache")


def problems(machine, **changes):
    return diagnosis.findings({**machine, **changes})


def test_this_machine_is_ready_and_what_a_run_uses_is_said(capsys):
    assert doctor.main(["--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ready"] and said["choices"]["communication"] in ("gloo", "nccl")
    assert "4-bit weights work" in said["choices"]["bitsandbytes"]
    assert {row["name"] for row in said["machine"]["packages"]} >= {"torch", "deepspeed", "transformers"}


def test_an_essential_lack_is_told_first_with_its_fix_and_the_status_is_one(machine, monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "describe_machine", lambda *folders: {**machine, "compiler": None, "gpus": []}
    )
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "MISSING: there is no C++ compiler" in text and "apt-get install g++" in text
    assert text.rstrip().endswith("not ready: something essential is missing")


def row(name, installed, fits, extra=None):
    return {"name": name, "supported": ">=2", "installed": installed, "fits": fits, "extra": extra}


@pytest.mark.parametrize(
    "package, essential, words",
    [
        (row("peft", None, False), True, "peft is not installed"),
        (row("peft", "1.0", False), True, "peft 1.0 is outside the supported range >=2"),
        (row("wandb", None, False, "wandb"), False, "log.wandb=true is refused"),
        (row("ruff", None, False, "dev"), None, ""),
    ],
)
def test_packages_are_judged_by_whether_every_run_needs_them(machine, package, essential, words):
    found = [each for each in problems(machine, packages=[package]) if package["name"] in each.problem]
    if essential is None:
        assert found == []
    else:
        (finding,) = found
        assert finding.essential is essential and words in finding.problem
        assert finding.fix == f"pip install '{package['name']}>=2'"


def test_a_compiler_is_essential_only_where_the_ranks_are_cpus(machine):
    assert problems(machine, compiler=None, gpus=[])[0].essential
    assert not any(each.essential for each in problems(machine, compiler=None, gpus=[{"name": "H100"}]))


def test_a_folder_that_cannot_be_written_and_a_full_one_are_told_apart(machine, tmp_path):
    file = tmp_path / "file"
    file.touch()
    blocked = disk("run folder", file / "runs")
    assert blocked["writable"] is False
    assert problems(machine, disks=[blocked])[0].essential
    full = disk("run folder", tmp_path) | {"free_bytes": 1 << 20}
    (finding,) = [each for each in problems(machine, disks=[full]) if "free" in each.problem]
    assert not finding.essential


def test_a_driver_without_a_gpu_for_torch_is_noticed(machine):
    found = problems(machine, gpus=[], nvidia_driver=True)
    assert any("runs would use the CPU" in each.problem for each in found)
    assert not any(
        "NVIDIA driver" in each.problem for each in problems(machine, gpus=[], nvidia_driver=False)
    )


def test_four_bit_weights_that_come_back_wrong_are_noticed(monkeypatch):
    import bitsandbytes.functional as functional
    import torch

    monkeypatch.setattr(functional, "dequantize_4bit", lambda packed, state: torch.zeros(64, 64))
    said, finding = diagnosis.try_four_bit(torch.device("cpu"))
    assert said == "wrong results" and finding.essential


def test_a_default_model_that_is_not_installed_is_told_and_stops_nobody(monkeypatch, capsys):
    assert diagnosis.without_default_model("smollm2-135m") is None
    monkeypatch.setattr(built_in, "SMOLLM2_PACKAGE", "llm-that-is-not-here")
    assert diagnosis.without_default_model("my/model") is None
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "model.path = smollm2-135m: the package llm-that-is-not-here is not installed" in text
    assert "or set model.path to a model folder" in text
