"""Finds the parts of a room by its folder: a new reader, objective, metric or audit is one new file there.

A room is a package. Each public module in it is one part and binds one agreed name, e.g. `OBJECTIVE` or
`READER`. Modules whose name starts with an underscore, and those named `base`, hold what the parts share.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from typing import Any

from gdrt_ds.errors import UserError, nearest

SHARED = ("base",)


@functools.cache
def part_names(package: str) -> tuple[str, ...]:
    """Returns the names of a room's modules in alphabetical order.

    None of them is imported, so settings can be checked cheaply.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"{package} is not a package")
    found = (module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))
    return tuple(sorted(name for name in found if not name.startswith("_") and name not in SHARED))


@functools.cache
def parts(package: str, attribute: str) -> dict[str, Any]:
    """Returns module name -> its `attribute`, for every module of the room that binds it."""
    modules = {name: importlib.import_module(f"{package}.{name}") for name in part_names(package)}
    return {
        name: getattr(module, attribute) for name, module in modules.items() if hasattr(module, attribute)
    }


def find_part(package: str, attribute: str, name: str, setting: str) -> Any:
    """Returns the part called `name`; imports that module only.

    Raises:
        UserError: there is no such part; names the setting, the nearest name and all that there are.
    """
    known = part_names(package)
    if name not in known:
        raise UserError(
            f"{setting} = {name} is unknown; {nearest(name, known)}", f"one of {', '.join(known)}"
        )
    return getattr(importlib.import_module(f"{package}.{name}"), attribute)
