"""An environment with nothing of this project but its wheel, and a working folder that tries to hide it.

The environment sees the packages of the running one (torch is 1 GB), but not the checkout. A .pth file names
their folder; Python reads no .pth file of a folder that is named in this way, so the editable install stays
unseen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from gdrt_ds.runtime import own_build_folder

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("gdrt_ds", "eval", "configs", "ds_configs", "slurm")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
HOSTILE = (
    "eval/__init__.py",
    "eval/run.py",
    "datasets/__init__.py",
    "peft/__init__.py",  # every training imports it
    "config.py",
    "files.py",
)
"""Names that users have in their folders; each one ends the process that imports it."""


@dataclass(frozen=True)
class Site:
    """Where the wheel, its environment and the user's folder are."""

    wheel: Path
    environment: Path
    folder: Path

    def run(self, command: str, *words: str, status: int = 0, **variables: str) -> str:
        """Runs a command of the environment in the user's folder; returns stdout and stderr together."""
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        cache = {"GDRT_CACHE": str(self.folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [str(self.environment / "bin" / command), *words],
            cwd=self.folder,
            env=inherited | cache | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, f"{command} {words}: status {done.returncode}\n{done.stdout}"
        return done.stdout


def build_wheel(folder: Path) -> Path:
    """Builds the wheel from a copy of the sources: building leaves files behind."""
    copy = folder / "sources"
    copy.mkdir()
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    words = [
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
        str(copy),
    ]
    _pip(*words)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_site(folder: Path) -> Site:
    """Builds the wheel, installs it into a new environment, and makes the user's folder."""
    own_build_folder()  # an environment of its own would build DeepSpeed's extension anew, for a minute
    wheel = build_wheel(folder)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = str(environment / "bin" / "python")
    _pip("--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    (own,) = environment.glob("lib/python3*/site-packages")
    (own / "packages_of_the_running_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work = folder / "work"
    for name in HOSTILE:
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise SystemExit('imported from the working folder: {name}')\n")
    return Site(wheel, environment, work)


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, cwd="/")
