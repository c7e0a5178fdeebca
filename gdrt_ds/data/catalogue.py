"""The catalogue: the titles that can be recommended, each once.

Items whose titles read the same are one entry. `Catalogue.build(corpus)` merges them, and
`catalogue.save(path)` writes catalogue.jsonl of the run folder. The token trie over the entries is
in trie.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gdrt_ds.data.corpus import Corpus, train_popularity
from gdrt_ds.data.readers.base import clean_title
from gdrt_ds.errors import UserError

NAME_SEPARATOR = " / "
"""Between the names of items that share a text."""


@dataclass
class CatalogueEntry:
    """One distinct title.

    Attributes:
        item_id: represents all merged ids; it is the first of them in corpus order.
        merged_ids: every item id with this title. Any of them is a hit.
        text: the title.
        train_count: train interactions of all merged ids together.
        provider: whoever offers or made it.
        groups: labels for metrics by item group, e.g. genres.
        name: what people call the merged items, where `data.item_text` chose another text; else None.
    """

    item_id: str
    merged_ids: list[str]
    text: str
    train_count: int
    provider: str | None = None
    groups: dict[str, list[str] | str] = field(default_factory=dict)
    name: str | None = None


class Catalogue:
    """The entries in corpus order.

    Attributes:
        entries: one per distinct title.
        index_of: any merged item id -> index of its entry.
    """

    def __init__(self, entries: list[CatalogueEntry]):
        self.entries = entries
        self.index_of = {item: index for index, entry in enumerate(entries) for item in entry.merged_ids}

    @classmethod
    def build(cls, corpus: Corpus) -> Catalogue:
        """Merges items with equal titles.

        Entities are resolved and white space is single before titles are compared. Upper and lower
        case differ.
        """
        counts = train_popularity(corpus)
        by_text: dict[str, CatalogueEntry] = {}
        for item in corpus.items.values():
            text = clean_title(item.title)
            entry = by_text.get(text)
            if entry is None:
                entry = by_text[text] = CatalogueEntry(
                    item.item_id, [], text, 0, item.provider, {"genres": []}
                )
            entry.merged_ids.append(item.item_id)
            entry.train_count += counts[item.item_id]
            entry.provider = entry.provider or item.provider
            if item.name is not None and item.name not in (entry.name or "").split(NAME_SEPARATOR):
                entry.name = item.name if entry.name is None else entry.name + NAME_SEPARATOR + item.name
            entry.groups["genres"] = list(dict.fromkeys([*entry.groups["genres"], *item.genres]))
        return cls(list(by_text.values()))

    def __len__(self) -> int:
        return len(self.entries)

    def text_of(self, item_id: str) -> str:
        """Returns the title of any merged id."""
        return self.entries[self.index_of[item_id]].text

    def notes(self) -> list[str]:
        """Says how many ids share a title or another text, for the start of a run."""
        extra = len(self.index_of) - len(self.entries)
        if not extra:
            return []
        if all(entry.name is None for entry in self.entries):
            return [
                f"{extra} of {len(self.index_of)} items share their title with another and are merged: "
                f"{len(self)} catalogue entries"
            ]
        largest = max(self.entries, key=lambda entry: len(entry.merged_ids))
        return [
            f"{extra} of {len(self.index_of)} items share their text with another and are merged, because a "
            f"model cannot tell them apart: {len(self)} catalogue entries, at most "
            f"{len(largest.merged_ids)} items in one ({largest.text})"
        ]

    def save(self, path: str | Path) -> None:
        """Writes one JSON object per entry: its fields, and its name where it has one."""
        with open(path, "w", encoding="utf-8") as stream:
            for entry in self.entries:
                row = asdict(entry)
                if entry.name is None:
                    del row["name"]
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Catalogue:
        """Reads what `save` wrote.

        Raises:
            UserError: missing file, or a line that is not an entry.
        """
        entries = []
        try:
            with open(path, encoding="utf-8") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        try:
                            entries.append(CatalogueEntry(**json.loads(line)))
                        except (ValueError, TypeError) as error:
                            raise UserError(
                                f"{path}, line {number}: not a catalogue entry ({error})",
                                "the file is written by training; do not edit it",
                            ) from None
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read: {error.strerror or error}",
                "give a run folder that holds catalogue.jsonl",
            ) from None
        return cls(entries)
