"""Looks at data without reading them: which reader takes them, which files and which columns it would use.

The readers' own detection and names are asked, so what is found here is what a run does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from gdrt_ds.config import DataSection
from gdrt_ds.data.corpus import reader_of, readers
from gdrt_ds.data.readers import sft, table
from gdrt_ds.data.readers._hub import on_this_machine
from gdrt_ds.data.readers._rows import header_of, pick_column
from gdrt_ds.data.readers.base import guess_domain
from gdrt_ds.data.text_rows import ROLES
from gdrt_ds.errors import UserError

EVENT_ROLES = {
    "user": table.USER,
    "item": table.ITEM,
    "timestamp": table.TIMESTAMP,
    "rating": table.RATING,
}
ITEM_ROLES = {"title": table.TITLE, "provider": table.PROVIDER, "genres": table.GENRES}
NEEDED = ("user", "item", "title")
"""Roles without which nothing can be trained. Without a timestamp the split is `leave_one_out`."""


@dataclass(frozen=True)
class Seen:
    """What a look at the data found.

    Attributes:
        format: name of the reader, a value of `data.format`.
        path: as the user gave it.
        items: file of the item table; None where the reader finds its files by itself.
        columns: role -> column; only tables have them.
        lacking: needed roles for which no column is known -> the columns there are.
        unused: columns of the interactions that play no role, e.g. one of times under an unknown name.
        domain: what an item is called in the prompt; None where the reader says it.
        groups_by: of rows of prompt and completion, the groups that their columns allow; None for logs.
    """

    format: str
    path: str
    items: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    domain: str | None = "item"
    groups_by: str | None = None


def look_at(path: str, items: str | None = None) -> Seen:
    """Recognises the data at a path, or an embedded set by its name.

    Raises:
        UserError: there is nothing, or a table without an item table.
    """
    given = DataSection(path=path, items=items)
    data = on_this_machine(given)
    reader = reader_of(data)
    if reader.supervised:
        seen = _look_at_rows(data.path)
    elif reader is not readers()["table"]:
        name = next(name for name, known in readers().items() if known is reader)
        # The other readers know what their items are; only windows go by the folder's name.
        domain = guess_domain(Path(path).resolve().name) if name == "windows" else None
        seen = Seen(name, path, items, domain=domain)
    else:
        seen = _look_at_table(data)
    # A config names a data set of the hub as it was given, not by its files on this machine.
    as_given = {data.items: items, data.path: path}
    return replace(seen, path=path, items=as_given.get(seen.items, seen.items))


def _look_at_rows(path: str) -> Seen:
    """Relevance needs the prompt without its evidence; without it a label serves, else the position."""
    there = sft.columns_of(Path(path))
    groups_by = "position"
    if "auxiliary_prompt" in there:
        groups_by = "relevance"
    elif "group" in there:
        groups_by = "label"
    roles = {role: role for role in ROLES if role in there}
    unused = [name for name in there if name not in roles]
    return Seen("sft", path, columns=roles, unused=unused, groups_by=groups_by)


def _look_at_table(data: DataSection) -> Seen:
    path = Path(data.path)
    folder = path if path.is_dir() else path.parent
    events = table.find_table(path, table.INTERACTION_NAMES) if path.is_dir() else path
    if events is None:
        known = ", ".join(f"{name}.*" for name in table.INTERACTION_NAMES)
        raise UserError(f"{path}: no interactions file there", f"name it as one of {known}, or give the file")
    header = header_of(events)
    items = data.items
    if items is None and table.find_table(folder, table.ITEM_NAMES) is None:
        if pick_column(events, header, "title", table.TITLE, {}, required=False) is None:
            raise UserError(
                f"{events}: it has no column of titles, and no item table is beside it",
                "put items.csv (item_id,title[,provider,genres]) there, or name the table with --items",
            )
        items = str(events)  # the titles stand in the interactions themselves
    item_file = Path(items) if items else table.find_table(folder, table.ITEM_NAMES)
    item_header = header_of(item_file)
    columns = {}
    lacking = {}
    for roles, file, names in ((EVENT_ROLES, events, header), (ITEM_ROLES, item_file, item_header)):
        for role, aliases in roles.items():
            column = pick_column(file, names, role, aliases, {}, required=False)
            if column is not None:
                columns[role] = column
            elif role in NEEDED:
                lacking[role] = names
    unused = [name for name in header if name not in columns.values()]
    return Seen("table", data.path, items, columns, lacking, unused, guess_domain(folder.resolve().name))
