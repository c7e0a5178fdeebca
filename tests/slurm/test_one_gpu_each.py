"""Slurm hands out GPUs in two ways, all of a node to every task or one to each; ranks meet under both."""

from __future__ import annotations

import json
import sys

import pytest
from harness import HERE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

WAYS = {
    "all seen by each": (["--gpus-per-node=2", "--ntasks-per-node=2"], 2),
    "one bound to each": (["--gpus-per-task=1", "--ntasks-per-node=2"], 1),
}


@pytest.fixture
def python_that_starts_fake_devices(site, tmp_path):
    """An interpreter for gdrt.sh: it replaces the trainer alone, and leaves the template's own tools."""
    folder = site.folder / tmp_path.name
    folder.mkdir(mode=0o755)
    script = folder / "python"
    instead = f"{HERE}/fake_devices.py {folder}/found"
    script.write_text(
        "#!/bin/bash\n"
        f'case "$1" in */gdrt_ds/train.py) exec {sys.executable} {instead} ;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("way", WAYS)
def test_ranks_meet_however_slurm_binds_gpus(site, python_that_starts_fake_devices, way):
    options, seen = WAYS[way]
    python = python_that_starts_fake_devices
    job = site.train(python.parent.name, "--nodes=2", *options, env={"GDRT_PYTHON": str(python)})
    site.wait(job, 300)
    found = [json.loads(path.read_text()) for path in sorted((python.parent / "found").glob("*.json"))]
    assert [one["rank"] for one in found] == [0, 1, 2, 3], site.log(job)
    assert len({one["node"] for one in found}) == 2
    for one in found:
        assert one["ranks_met"] == 4 and one["accelerator"] == "cuda"
        assert len(one["visible"]) == seen
        device = 0 if seen == 1 else one["local_rank"]
        assert one["device"] == f"cuda:{device}" and one["told_deepspeed"] == str(device)
    # Two ranks of a node never share a GPU.
    taken = {(one["node"], one["visible"][int(one["told_deepspeed"])]) for one in found}
    assert len(taken) == 4
