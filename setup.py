"""Builds the wheel: what users see as configs/, ds_configs/ and slurm/ goes into it as gdrt_ds/presets/.

Everything else about the package stands in pyproject.toml. A checkout and an editable install read the
folders where they are (gdrt_ds/files.py: `preset_path`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PRESETS = ("configs", "ds_configs", "slurm")


class BuildWithPresets(build_py):
    """The packages, and beside them the presets."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        here = Path(__file__).resolve().parent
        for name in PRESETS:
            target = Path(self.build_lib) / "gdrt_ds" / "presets" / name
            # A file that was renamed since the last build must not come along.
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(here / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


setup(cmdclass={"build_py": BuildWithPresets})
