"""Mistakes are named, with their fix, before any rank starts.

All the wrong jobs are submitted together, each test reads one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from harness import HOME

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def wrong(site):
    """name -> (state, exit status, log) of every wrong job."""
    bare = site.folder / "bare"  # the project without an environment
    bare.mkdir()
    for name in ("slurm", "gdrt_ds", "configs"):
        (bare / name).symlink_to(HOME / name)
    (site.folder / "a_file").touch()
    good = ["--config", str(site.config), f"run.dir={site.folder}/wrong"]
    gdrt = str(HOME / "slurm" / "gdrt.sh")
    jobs = {
        "missing config": site.sbatch(gdrt, "--config", "configs/nowhere.yaml"),
        "unknown key": site.sbatch(gdrt, *good, "train.max_step=3"),
        "unwritable run folder": site.sbatch(
            gdrt, "--config", site.config, f"run.dir={site.folder}/a_file/run"
        ),
        "unequal GPUs": site.sbatch("--nodes=2", "--ntasks=3", "--gpus=3", gdrt, *good),
        "no environment": site.sbatch(
            gdrt,
            *good,
            env={"GDRT_HOME": str(bare), "GDRT_PYTHON": None, "VIRTUAL_ENV": "", "CONDA_PREFIX": ""},
        ),
        "environment is gone": site.sbatch(
            gdrt, *good, env={"GDRT_PYTHON": None, "GDRT_VENV": "/nowhere/venv"}
        ),
        "project not found": site.sbatch(gdrt, *good, env={"GDRT_HOME": None}),
        "evaluation of nothing": site.sbatch(
            str(HOME / "slurm" / "eval.sh"), "--run", str(site.folder / "nothing")
        ),
        "sweep without an array": site.sbatch(
            str(HOME / "slurm" / "sweep.sh"), "--seeds", "0,1", "--", *good
        ),
        "set-up file is gone": site.sbatch(gdrt, *good, env={"GDRT_SETUP": "/nowhere/site.sh"}),
        "modules without a module command": site.sbatch(gdrt, *good, env={"GDRT_MODULES": "cuda/12.4"}),
    }
    return {
        name: (site.wait(job, 120), site.cluster.job(job)["ExitCode"], site.log(job))
        for name, job in jobs.items()
    }


@pytest.mark.parametrize(
    "name, problem, fix",
    [
        ("missing config", "configs/nowhere.yaml: no such file", "configs/smoke.yaml"),
        (
            "unknown key",
            "unknown key `train.max_step`; did you mean `train.max_steps`?",
            "docs/config-reference.md",
        ),
        ("unwritable run folder", "a_file/run: not writable (Not a directory)", "choose another run.dir"),
        (
            "unequal GPUs",
            "unequal GPUs per node: node1 has 2,node2 has 1",
            "--gpus-per-node=N instead of --gpus=N",
        ),
        ("no environment", "no Python environment", "make install"),
        (
            "environment is gone",
            "the Python interpreter /nowhere/venv/bin/python does not exist on node",
            "GDRT_VENV",
        ),
        ("project not found", "the project was not found from", "set GDRT_HOME"),
        ("evaluation of nothing", "not a run folder", "run.dir of a training"),
        ("sweep without an array", "slurm/sweep.sh is not part of a job array", "sbatch --array=0-N%2"),
        ("set-up file is gone", "GDRT_SETUP = /nowhere/site.sh: no such file", "every node can read"),
        ("modules without a module command", "this node has no command `module`", "GDRT_SETUP"),
    ],
)
def test_a_mistake_ends_the_job_with_its_name_and_its_fix(wrong, name, problem, fix):
    state, code, log = wrong[name]
    assert (state, code) == ("FAILED", "2:0"), log
    assert problem in log and "error: " in log
    assert fix in log.split("fix:")[1]


def test_an_interpreter_without_the_packages_says_which_are_missing(site, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    job = site.sbatch(
        str(HOME / "slurm" / "gdrt.sh"),
        "--config",
        str(site.config),
        env={"GDRT_PYTHON": None, "GDRT_VENV": str(tmp_path / "venv")},
    )
    assert site.wait(job, 60) == "FAILED"
    assert "cannot run gdrt_ds" in site.log(job) and "No module named" in site.log(job)


def test_outside_a_job_the_script_says_how_it_is_started(site):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {"GDRT_HOME": str(HOME)}
    done = subprocess.run(["bash", str(HOME / "slurm" / "gdrt.sh")], capture_output=True, text=True, env=env)
    assert (
        done.returncode == 2
        and "outside a Slurm job" in done.stderr
        and "sbatch slurm/gdrt.sh" in done.stderr
    )


def test_modules_are_loaded_and_the_site_script_is_sourced_before_python_is_looked_for(site):
    setup = site.folder / "site.sh"
    setup.write_text("echo sourced\n", encoding="utf-8")
    loads = site.folder / "profile.sh"
    loads.write_text('module() { echo "loaded: $*"; }\n', encoding="utf-8")
    job = site.sbatch(
        str(HOME / "slurm" / "gdrt.sh"),
        "--config",
        "nowhere.yaml",
        env={"GDRT_MODULES": "cuda/12.4 gcc/13", "BASH_ENV": str(loads), "GDRT_SETUP": str(setup)},
    )
    assert site.wait(job, 60) == "FAILED"
    log = site.log(job)
    assert "loaded: load cuda/12.4 gcc/13" in log and log.index("loaded:") < log.index("sourced") < log.index(
        "gdrt: python:"
    )
