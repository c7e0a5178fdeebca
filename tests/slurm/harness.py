"""What the Slurm tests and the fault table share.

A cluster with the project on it, jobs, runs and their metrics.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
HOME = HERE.parent.parent
sys.path.insert(0, str(HERE / "cluster"))

from cluster import Cluster  # noqa: E402

COMPARED = ("loss", "lr", "grad_norm", "group_loss", "group_weight", "group_count", "objective", "tokens")
LIVING = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")


def write_config(folder: Path, **train) -> Path:
    """A run of seconds on CPUs: tiny random model, planted data, NF4, ZeRO-3.

    A batch that 1, 2 and 3 ranks divide.
    """
    config = {
        "data": {"path": "planted", "limit_train": 96, "limit_valid": 12, "limit_test": 24},
        "model": {
            "path": "tiny-random",
            "quantization": "nf4",
            "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"},
        },
        "train": {
            "max_steps": 40,
            "global_batch": 12,
            "lr": 0.003,
            "warmup_steps": 2,
            "save_every": 10,
            "eval_every": 20,
            "log_every": 1,
            "timeout_s": 300,
            "debug_sync": True,
        }
        | train,
        "objective": "gdrt",
        "groups": {"num": 4},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


class Site:
    """A cluster with this checkout on every node, and a folder for runs and logs."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder, self.home = cluster, folder, HOME
        self.config = write_config(folder)

    @staticmethod
    def environment(extra: dict[str, str | None] | None = None) -> dict[str, str]:
        env = {"GDRT_HOME": str(HOME), "GDRT_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | (extra or {})
        return {k: v for k, v in env.items() if v is not None}

    def sbatch(self, *words: str, env: dict[str, str | None] | None = None, user: str | None = None) -> str:
        """Submits and returns the job id; the job's output goes to FOLDER/ID.log."""
        words = [str(w) for w in words]
        done = self.cluster.login(
            "sbatch",
            "--parsable",
            f"--output={self.folder}/%j.log",
            *words,
            env=self.environment(env),
            cwd=self.folder,
            user=user,
        )
        return done.stdout.strip()

    def script(
        self, name: str, *options: str, arguments: list[str] = (), env: dict[str, str | None] | None = None
    ) -> str:
        return self.sbatch(*options, str(HOME / "slurm" / name), *arguments, env=env)

    def train(
        self, name: str, *options: str, overrides: list[str] = (), env: dict[str, str | None] | None = None
    ) -> str:
        """gdrt.sh on the tiny config, without the separate plan (it would load the libraries once more)."""
        return self.script(
            "gdrt.sh",
            *options,
            arguments=["--config", str(self.config), f"run.dir={self.run(name)}", *overrides],
            env={"GDRT_PLAN": "0"} | (env or {}),
        )

    def run(self, name: str) -> Path:
        return self.folder / name

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def wait(self, job: str, seconds: float = 300) -> str:
        """The state in which the job ended."""

        def ended():
            state = self.cluster.job(job).get("JobState", "PENDING")
            return None if state in LIVING else state

        return self.until(ended, seconds, f"job {job} did not end", job)

    def until(self, condition, seconds: float, complaint: str, job: str = ""):
        end = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > end:
                raise TimeoutError(f"{complaint} within {seconds:.0f} s; log:\n{self.log(job)[-4000:]}")
            time.sleep(0.2)
        return found

    def cancel_all(self) -> None:
        self.cluster.login("scancel", "-u", "root", check=False)
        end = time.monotonic() + 60
        while self.cluster.login("squeue", "-h").stdout.strip() and time.monotonic() < end:
            time.sleep(0.2)


def metrics(run: Path) -> dict[int, dict]:
    """metrics.jsonl by step. A step that appears twice, or a broken line, is an error."""
    found: dict[int, dict] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["step"] in found:
            raise AssertionError(f"{run}: step {record['step']} appears twice in metrics.jsonl")
        found[record["step"]] = record
    return found


def largest_difference(one: dict[int, dict], other: dict[int, dict]) -> float:
    """Largest absolute difference over all compared figures of all steps.

    Infinite if the steps or the groups present differ.
    """
    if one.keys() != other.keys():
        return float("inf")
    worst = 0.0
    for step, record in one.items():
        for name in COMPARED:
            a, b = record[name], other[step][name]
            for x, y in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
                if (x is None) != (y is None):
                    return float("inf")
                worst = max(worst, abs(x - y) if x is not None else 0.0)
    return worst


def status(run: Path) -> str | None:
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8"))["status"] if path.is_file() else None


def lives(run: Path) -> list[dict]:
    path = run / "logs" / "slurm" / "lives.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    )


def single_process(config: Path, run: Path) -> None:
    """The undisturbed run: one rank, no Slurm."""
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_"))
    }
    done = subprocess.run(
        [sys.executable, str(HOME / "gdrt_ds" / "train.py"), "--config", str(config), f"run.dir={run}"],
        capture_output=True,
        text=True,
        env=env | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(
            "the single-process run failed with status "
            f"{done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
