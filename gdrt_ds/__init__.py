"""Group-DRO fine-tuning of LLM recommenders; this module holds the version and the public names.

    import gdrt_ds
    config = gdrt_ds.load_config("configs/smoke.yaml", ["dro.tau=0.5"])
    out = gdrt_ds.group_cross_entropy(hidden, head_weight, labels, groups, num_groups=8)

Importing `gdrt_ds` is cheap: a public name imports its module (and with it torch) when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

try:
    __version__ = importlib.metadata.version("gdrt-ds")
except importlib.metadata.PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

_HOMES = {
    "CatalogueLogitsProcessor": "gdrt_ds.inference.constrained",
    "GroupCollator": "gdrt_ds.integrations",
    "GroupDroLoss": "gdrt_ds.integrations",
    "Objective": "gdrt_ds.objectives",
    "RunConfig": "gdrt_ds.config",
    "UserError": "gdrt_ds.errors",
    "bin_tokens": "gdrt_ds.integrations",
    "get_objective": "gdrt_ds.objectives",
    "group_cross_entropy": "gdrt_ds.loss",
    "load_config": "gdrt_ds.config",
    "load_corpus": "gdrt_ds.data.corpus",
    "open_run": "gdrt_ds.inference.recommender",
    "score_tokens": "gdrt_ds.integrations",
}
"""Public name -> the module that holds it."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gdrt_ds' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
