"""Reads the lines `user<TAB>title` of a .pairs file, in the order in which things were chosen."""

from __future__ import annotations

from pathlib import Path

from gdrt_ds.config import DataSection
from gdrt_ds.data.readers.base import BadRows, Interactions, Item, Reader


def detect(data: DataSection) -> bool:
    return Path(data.path).suffix == ".pairs"


def read(data: DataSection, bad: BadRows) -> Interactions:
    path = Path(data.path)
    users, titles = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        user, tab, title = line.partition("\t")
        if not tab or not title.strip():
            bad.report(path, number, "title", "the line is not `user<TAB>title`")
            continue
        users.append(user)
        titles.append(title.strip())
    items = {title: Item(title, title) for title in titles}
    times = [float(place) for place in range(len(users))]  # the order of the lines is the order in time
    return Interactions(users, titles, times, None, items)


READER = Reader(detect, read, order=50)
