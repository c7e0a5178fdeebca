"""What every reader shares: the records of a corpus, the account of bad rows, and the reading of values.

A reader returns `Windows` (history and target already cut, as in the MSL/LBR/BIGRec files), or `Interactions`
or `InteractionColumns` (one row per event, as lists or as arrays; `gdrt_ds.data.interactions` makes the
windows). All end as `Sample`s of a `gdrt_ds.data.corpus.Corpus`.
"""

from __future__ import annotations

import ast
import html
import io
import json
import math
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from gdrt_ds.config import DataSection
from gdrt_ds.errors import UserError

RATINGS_UNUSED = (
    "the ratings are not used: every interaction counts as liked; data.min_rating=4 would keep those rated 4 "
    "and above"
)
"""The note of data with ratings where `data.min_rating` is empty."""


_TOUCHING = re.compile(r"""['"]\s*[a-zA-Z]{0,2}['"]""")
"""Two quotation marks with nothing but white space, or the prefix of a literal, between them."""


@dataclass(frozen=True)
class Item:
    """One item. `title` is clean text (entities resolved, white space single).

    `provider` is whoever offers or made it. `name` is what people call it, where `data.item_text` chose
    another text as `title`.
    """

    item_id: str
    title: str
    provider: str | None = None
    genres: tuple[str, ...] = ()
    name: str | None = None


@dataclass(frozen=True)
class Sample:
    """One window: predict `target` from `history` (item ids, oldest first).

    `timestamp` is the target's, in the data's own unit.
    """

    sample_id: int
    user_id: str
    history: tuple[str, ...]
    target: str
    timestamp: float | None = None
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class Windows:
    """Windows, one sequence per split that the files hold; samples carry provisional ids."""

    splits: dict[str, Sequence[Sample]]
    items: dict[str, Item]
    users: dict[str, dict[str, str]] = field(default_factory=dict)
    domain: str = "item"


@dataclass
class Interactions:
    """Parallel lists, one entry per event, in file order. `timestamps` is None when the files have none.

    `notes` are sentences of the reader for the user, e.g. about a column that is not used.
    """

    users_of: list[str]
    items_of: list[str]
    timestamps: list[float] | None
    ratings: list[float] | None
    items: dict[str, Item]
    users: dict[str, dict[str, str]] = field(default_factory=dict)
    domain: str = "item"
    notes: list[str] = field(default_factory=list)


class Names(Sequence[str]):
    """Texts behind each other in one buffer; a list of them would take five times the memory.

    Attributes:
        data: uint8, UTF-8 of all texts.
        offsets: int64[number + 1], where each text begins.
    """

    def __init__(self, data: np.ndarray, offsets: np.ndarray):
        self.data = data
        self.offsets = offsets

    @classmethod
    def of(cls, texts: Sequence[str]) -> Names:
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        return cls(np.frombuffer(b"".join(parts), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):
        return self.bytes_of(index).decode("utf-8", "surrogatepass")

    def bytes_of(self, index: int) -> bytes:
        """UTF-8 of one text."""
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()


@dataclass
class InteractionColumns:
    """What a reader found: `Interactions` as arrays, in file order.

    Attributes:
        users_of: int32[R], number of the user in `user_names`.
        items_of: int32[R], place of the item in `items`.
        times: float64[R], or None where the files have none.
        ratings: float64[R], or None likewise.
        user_names: user ids by number.
        items: item id -> Item; their order gives the numbers.
        users, domain, notes: as in `Interactions`.
    """

    users_of: np.ndarray
    items_of: np.ndarray
    times: np.ndarray | None
    ratings: np.ndarray | None
    user_names: Names
    items: dict[str, Item]
    users: dict[str, dict[str, str]] = field(default_factory=dict)
    domain: str = "item"
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, events: Interactions) -> InteractionColumns:
        """Returns the columns of a reader's lists.

        Raises:
            UserError: an interaction names an item that the reader's item table does not have.
        """
        number: dict[str, int] = {}
        users = [number.setdefault(user, len(number)) for user in events.users_of]
        place = {item: index for index, item in enumerate(events.items)}
        try:
            items = [place[item] for item in events.items_of]
        except KeyError as missing:
            raise UserError(
                f"item id {missing.args[0]} has no title", "give every item of the interactions a title"
            ) from None
        return cls(
            np.array(users, np.int32),
            np.array(items, np.int32),
            None if events.timestamps is None else np.array(events.timestamps, np.float64),
            None if events.ratings is None else np.array(events.ratings, np.float64),
            Names.of(list(number)),
            events.items,
            events.users,
            events.domain,
            list(events.notes),
        )


class BadRows:
    """Decides what happens to a row that cannot be used: an error at once, or a count in the corpus notes.

    Args:
        skip: `data.on_bad_row == "skip"`.
    """

    def __init__(self, skip: bool):
        self.skip = skip
        self.counts: Counter[tuple[str, str]] = Counter()
        self.first: dict[tuple[str, str], str] = {}

    def report(
        self,
        path: Path | str,
        line: int | None,
        field_name: str,
        problem: str,
        kind: str | None = None,
        row_stays: bool = False,
    ) -> None:
        """Raises UserError with file, line, field and problem; when skipping, it counts the row instead.

        Args:
            kind: what the count is called; by default the field.
        """
        name = Path(path).name
        where = f"{name}, line {line}" if line is not None else name
        if not self.skip:
            raise UserError(
                f"{where}, field `{field_name}`: {problem}",
                "correct the row, or set data.on_bad_row=skip to leave such rows out (they are counted and "
                "reported)",
            )
        kind = kind or f"field `{field_name}` unusable"
        key = (name, kind if row_stays else f"rows left out, {kind}")
        self.counts[key] += 1
        self.first.setdefault(key, f"{where}: {problem}")

    def notes(self) -> list[str]:
        return [
            f"{name}: {kind}: {count} (first: {self.first[name, kind]})"
            for (name, kind), count in self.counts.items()
        ]


@dataclass(frozen=True)
class Reader:
    """One way to read data; the file that binds it as `READER` gives it its name, a value of `data.format`.

    Attributes:
        detect: whether `data.path` looks like this reader's format (`data.format=auto`). It is called on
            whatever the user gave: a file, a folder, the name of an embedded set, or something that does
            not exist.
        read: the data as `Windows` or `Interactions`, or as rows. Bad rows go to `BadRows.report`; raises
            UserError.
        order: readers are asked in this order, the special before the general.
        embedded: names of data sets that need no path.
        item_table: items may come from a table, a column of which `data.item_text` can name.
        uses: which of the settings items, users, train_file, planted and columns.ROLE it reads for these
            data. The others are told where the user gave them; None = nothing is told.
        supervised: the data are rows of prompt and completion (`TextRows` of text_rows.py), without a
            catalogue; `data.path` may then be a data set of the hub.
    """

    detect: Callable[[DataSection], bool]
    read: Callable[[DataSection, BadRows], Any]
    order: int
    embedded: tuple[str, ...] = ()
    item_table: bool = False
    supervised: bool = False
    uses: Callable[[DataSection], Collection[str]] | None = None


def clean_title(text: str) -> str:
    """Returns a title as people read it.

    HTML entities are resolved, also doubly escaped ones. Runs of white space, no-break spaces too, become one
    space, and the ends are stripped.
    """
    for _ in range(3):
        resolved = html.unescape(text)
        if resolved == text:
            break
        text = resolved
    return " ".join(text.split())


def parse_list(text: object) -> list:
    """Returns the list of a list literal (JSON or Python), or of a value that is a list already (parquet).

    It never evaluates code.

    Raises:
        ValueError: this is not a flat list of plain values.
    """
    if hasattr(text, "tolist"):
        text = text.tolist()
    if isinstance(text, str):
        text = _list_literal(text)
    if not isinstance(text, (list, tuple)):
        raise ValueError(f"{_short(text)} is not a list; a list literal such as [12, 7, 9] is expected")
    for value in text:
        if value is None or isinstance(value, (list, tuple, dict, set, bool)):
            raise ValueError(f"list {_short(text)} holds {value!r}; plain ids are expected")
    return list(text)


def _list_literal(text: str) -> object:
    """The value of a JSON or Python literal.

    Python joins texts that touch. NumPy prints an array without commas, and its ids would become one.

    Raises:
        ValueError: neither, or a list of texts that touch.
    """
    try:
        return json.loads(text)
    except ValueError:
        source = text.strip()
    try:
        value = ast.literal_eval(source)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise ValueError(
            f"malformed list {_short(text)}; a list literal such as [12, 7, 9] is expected"
        ) from None
    if isinstance(value, (list, tuple)) and _TOUCHING.search(source):
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        texts = sum(token.type == tokenize.STRING for token in tokens)
        if texts > sum(isinstance(element, str) for element in value):
            raise ValueError(
                f"malformed list {_short(text)}: no comma between its texts, as NumPy prints an array; a "
                "list literal such as ['B1', 'B2'] is expected"
            )
    return value


def parse_number(text: object) -> float:
    """Returns a finite number, or the seconds of an ISO 8601 date (UTC where it names no zone).

    Raises:
        ValueError: it is anything else.
    """
    try:
        value = float(text)
    except (TypeError, ValueError):
        if isinstance(text, datetime):
            moment = text
        else:
            try:
                moment = datetime.fromisoformat(str(text).strip().replace("Z", "+00:00"))
            except ValueError:
                raise ValueError(f"{_short(text)} is not a number") from None
        value = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    if not math.isfinite(value):
        raise ValueError(f"{_short(text)} is not finite")
    return value


def parse_genres(value: object) -> tuple[str, ...]:
    """Returns genres from a list, a list literal, or text split at `|` or `;`.

    A comma may belong to a name and does not split.
    """
    if value is None or value == "":
        return ()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = parse_list(text)
            except ValueError:
                value = [text]
        else:
            value = text.replace(";", "|").split("|")
    flat = [part for entry in value for part in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return tuple(dict.fromkeys(clean_title(str(part)) for part in flat if str(part).strip()))


def as_id(value: object) -> str:
    """Returns an id as text, which is empty where the value is none: a gap, a blank text, or not a number.

    12, 12.0 and "12" are the same id: a table library may widen an integer column with gaps to float.
    """
    if value is None or value != value:  # NaN is how a table library writes a gap
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def guess_domain(name: str, default: str = "item") -> str:
    """Returns what an item is called in a prompt, from the data set's name."""
    lowered = name.lower()
    for key, domain in (
        ("book", "book"),
        ("movie", "movie"),
        ("ml-", "movie"),
        ("music", "album"),
        ("game", "video game"),
        ("amazon", "product"),
    ):
        if key in lowered:
            return domain
    return default


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
