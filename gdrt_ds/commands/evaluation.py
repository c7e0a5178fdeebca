"""gdrt-eval and gdrt-compare: the mains of `eval`, whatever the working folder holds.

gdrt_ds never imports eval. These two start it by its name, as a launcher does, after the path is in order:
many users have a folder `eval/` of their own.
"""

from __future__ import annotations

import importlib

from gdrt_ds.invocation import put_own_packages_first


def evaluate() -> None:
    """Runs `python -m eval.run`; the arguments are those of the command line."""
    put_own_packages_first()
    importlib.import_module("eval.run").main()


def compare() -> int:
    """Runs `python -m eval.compare`; returns its exit status."""
    put_own_packages_first()
    return importlib.import_module("eval.compare.__main__").main()
