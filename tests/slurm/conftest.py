"""One simulated Slurm cluster for all tests of this folder.

Without root, namespaces or Slurm they are skipped with the reason.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent / "cluster")]

from cluster import Cluster, Shape, why_not  # noqa: E402
from harness import Site  # noqa: E402


@pytest.fixture(scope="session")
def site():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = Path(
        tempfile.mkdtemp(prefix="gdrt-slurm-")
    )  # short, and open to everyone: munge insists, and sockets have short names
    folder.chmod(0o755)
    runs = folder / "runs"
    runs.mkdir(mode=0o755)
    try:
        with Cluster(folder / "cluster", Shape(nodes=3, gpus=4)) as cluster:
            yield Site(cluster, runs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
