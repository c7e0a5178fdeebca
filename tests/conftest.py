"""Which tests may run side by side: those of one file stay together, and so do all that share the cluster."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Names the group of every test for `pytest -n N --dist loadgroup`."""
    for item in items:
        shared = "slurm" if item.get_closest_marker("slurm") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(shared))
