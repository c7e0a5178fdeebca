"""All objectives on one trainer: one file each; `get_objective` finds them by name.

A name is a file's OBJECTIVE.name, or `package.module:ATTRIBUTE` for an objective that lives in your own
package.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from gdrt_ds.errors import UserError, did_you_mean
from gdrt_ds.objectives.base import GroupView, Objective, TokenTable, TokenView, mean

__all__ = ["GroupView", "Objective", "TokenTable", "TokenView", "get_objective", "mean", "objectives"]


@functools.cache
def objectives() -> dict[str, Objective]:
    """Every objective of this folder by its name."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        objective = getattr(importlib.import_module(f"{__name__}.{module.name}"), "OBJECTIVE", None)
        if objective is not None:
            found[objective.name] = objective
    return found


def get_objective(name: str) -> Objective:
    """Returns the objective of a name, or of `package.module:ATTRIBUTE`.

    Raises:
        UserError: the name is unknown, or it cannot be imported.
    """
    if name in objectives():
        return objectives()[name]
    module, sep, attribute = name.partition(":")
    if sep:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"objective = {name!r} cannot be imported: {error}",
                "write package.module:ATTRIBUTE of an importable module",
            ) from None
        if isinstance(found, Objective):
            return found
        raise UserError(
            f"objective = {name!r} is a {type(found).__name__}, not a gdrt_ds.objectives.Objective",
            "see docs/method.md",
        )
    raise UserError(
        f"objective = {name!r} is unknown{did_you_mean(name, objectives())}",
        f"one of {', '.join(sorted(objectives()))}, or package.module:ATTRIBUTE",
    )
