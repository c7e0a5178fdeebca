"""Completion of options and settings in the shell, by the library argcomplete (extra `completion`).

    eval "$(register-python-argcomplete gdrt-train)"        in ~/.bashrc, once for each command

The shell then starts the command with the variable _ARGCOMPLETE, and it answers instead of running.
"""

from __future__ import annotations

import argparse
import os


def offer_completion(parser: argparse.ArgumentParser) -> None:
    """Answers the shell and ends the process, if the shell is asking; else does nothing."""
    if not asked():
        return
    import argcomplete

    for action in parser._actions:
        if action.dest == "overrides":
            vars(action)["completer"] = settings_that_begin_with
    argcomplete.autocomplete(parser)


def asked() -> bool:
    """Whether the shell started this process to complete a line."""
    return "_ARGCOMPLETE" in os.environ


def settings_that_begin_with(prefix: str, **_: object) -> list[str]:
    """`key.sub=` for every setting of a run."""
    from gdrt_ds.config import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(prefix)]
