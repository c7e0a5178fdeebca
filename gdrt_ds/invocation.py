"""How a process of ours is started: by which name, and from which folders it imports.

The folder where a user works may hold an `eval/` or a `config.py` of its own, and `python -m` puts that
folder first on Python's path. Our commands and what they start must find our packages all the same. This
module needs the standard library only, so that it can be used before anything else is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gdrt_ds.files import REPOSITORY

_RUN_MODULE = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
if {home!r} not in sys.path:
    sys.path.insert(0, {home!r})
import runpy
from gdrt_ds.invocation import put_own_packages_first
put_own_packages_first()
runpy.run_module({name!r}, run_name="__main__", alter_sys=True)
"""


def command_name(otherwise: str) -> str:
    """Returns what the user typed where that is one of our commands (`gdrt-train`), else `otherwise`."""
    typed = Path(sys.argv[0]).name
    if typed.startswith("gdrt-"):
        return typed
    return otherwise


def put_own_packages_first() -> None:
    """Makes modules of the working folder unable to hide ours; call it before the first late import.

    A working folder that Python put on the path leaves it. One that PYTHONPATH names stays, behind all
    others, so that a module of the user's (`objective=my_module:OBJECTIVE`) is still found: DeepSpeed's
    multi-node launcher writes the working folder there, and so do users.
    """
    here = os.path.realpath(os.curdir)
    if here == os.path.realpath(REPOSITORY):
        return
    kept = [entry for entry in sys.path if entry and os.path.realpath(entry) != here]
    if any(os.path.realpath(entry) == here for entry in _named_by_the_user()):
        kept.append(here)
    if str(REPOSITORY) not in map(os.path.realpath, kept):
        kept.insert(0, str(REPOSITORY))
    sys.path[:] = kept


def _named_by_the_user() -> list[str]:
    """The folders of PYTHONPATH; an empty entry is the working folder."""
    value = os.environ.get("PYTHONPATH", "")
    if not value:
        return []
    return [entry or os.curdir for entry in value.split(os.pathsep)]


def safe_environment() -> dict[str, str]:
    """Returns the environment for processes that we start: they do not import from the working folder.

    Python 3.10 does not know PYTHONSAFEPATH; there `put_own_packages_first` does it in the process itself.
    """
    return os.environ | {"PYTHONSAFEPATH": "1"}


def module_command(name: str) -> list[str]:
    """Returns the words that run an installed module like `python -m`, whatever the working folder holds."""
    return [sys.executable, "-c", _RUN_MODULE.format(home=str(REPOSITORY), name=name)]
