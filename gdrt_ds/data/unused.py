"""Settings of `data` that the user gave and that nothing reads: a note for each, so that none is believed.

Only values that differ from the default count, because a saved config names every setting.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from gdrt_ds.config import DataSection

OF_READERS = ("items", "users", "train_file", "planted")
"""Settings that some readers read and others do not; `columns.ROLE` are the others."""
OF_LOGS = ("kcore", "min_rating", "split")
"""Settings of how windows are made of interactions."""
OF_WINDOWS = ("windows", "history_length", "min_history", "item_text", *OF_LOGS)
"""Settings about histories of items."""


def unused_by_reader(data: DataSection, name: str, used: Collection[str] | None) -> list[str]:
    """Lines about settings that a reader does not read.

    Args:
        name: of the reader's format.
        used: of `OF_READERS` and `columns.ROLE`, those that the reader reads; None where it does not say.
    """
    lines = []
    if data.train_file and name != "windows":
        lines.append(f"data.train_file = {data.train_file} is not used: only the format `windows` has it")
    if used is None:
        return lines
    given = {setting: getattr(data, setting) for setting in OF_READERS if setting != "train_file"}
    given |= {f"columns.{role}": column for role, column in data.columns.items()}
    for setting, value in given.items():
        if value and setting not in used:
            only = "only the generated data `planted` have it"
            why = only if setting == "planted" else f"the reader of {data.path} does not read it"
            lines.append(_line(setting, value, why))
    return lines


def unused_for_windows(data: DataSection, has_valid: bool) -> list[str]:
    """Lines about settings of interactions, where the windows are ready-made.

    Args:
        has_valid: the windows have a valid split, so none is carved from train.
    """
    settings = (*OF_LOGS, "split_ratio") if has_valid else OF_LOGS
    return _changed(data, settings, "the windows and their splits are ready-made")


def unused_for_rows(data: DataSection, has_splits: bool) -> list[str]:
    """Lines about settings of items and histories, where the data are rows of text.

    Args:
        has_splits: the rows have splits of their own.
    """
    lines = _changed(data, (*OF_READERS, *OF_WINDOWS), "rows of text have neither items nor histories")
    if has_splits:
        lines += _changed(data, ("split_ratio",), "the rows have splits of their own")
    return lines


def unused_for_log(data: DataSection) -> list[str]:
    """Lines about settings of another kind of split, where the data are interactions."""
    if data.split != "leave_one_out":
        return []
    return _changed(data, ("split_ratio",), "data.split=leave_one_out takes the last items of each user")


def _changed(data: DataSection, settings: tuple[str, ...], why: str) -> list[str]:
    default = DataSection()
    return [
        _line(setting, getattr(data, setting), why)
        for setting in settings
        if getattr(data, setting) != getattr(default, setting)
    ]


def _line(setting: str, value: Any, why: str) -> str:
    shown = list(value) if isinstance(value, tuple) else value
    return f"data.{setting} = {shown} is not used: {why}"
