"""Reader of Amazon reviews with metadata: JSON lines (.gz too) of the 2018 and of the 2023 release.

`data.path` is the reviews file, or a folder with one file of reviews and one of metadata. Beside a reviews
file the metadata are what `data.items` names, or a file named meta*. The keys are

    2018   reviewerID, asin, unixReviewTime, overall      asin, title, brand, category
    2023   user_id, parent_asin, timestamp, rating        parent_asin, title, store, categories

A product's provider is its brand (2018) or its store (2023).
"""

from __future__ import annotations

from pathlib import Path

from gdrt_ds.config import DataSection
from gdrt_ds.data.readers._rows import header_of, require_file
from gdrt_ds.data.readers.base import BadRows, InteractionColumns, Reader, guess_domain
from gdrt_ds.data.readers.table import USES, read_events, read_item_table, read_user_table
from gdrt_ds.errors import UserError

_KEYS = (("reviewerID", "asin"), ("user_id", "parent_asin"), ("user_id", "asin"))
_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def is_amazon_reviews(path: Path) -> bool:
    """Whether the first row of a file, or of a file in a folder, has the keys of reviews."""
    return _reviews_file(path) is not None


def read_amazon_reviews(data: DataSection, bad: BadRows) -> InteractionColumns:
    """Reads reviews and metadata.

    Raises:
        UserError: no reviews or metadata file, missing key, unreadable value (file, line, field), or a
            reviewed product without title.
    """
    reviews = _reviews_file(Path(data.path))
    if reviews is None:
        raise UserError(
            f"data.path={data.path}: no Amazon reviews there",
            "expected JSON lines (.gz too) with reviewerID and asin (2018) or user_id and parent_asin (2023)",
        )
    if data.items:
        meta = Path(data.items)
    else:
        beside = [path for path in _candidates(reviews.parent) if path != reviews]
        meta = next((path for path in beside if path.name.lower().startswith("meta")), None)
    if meta is None:
        raise UserError(
            f"data.path={data.path}: no metadata file (meta*.jsonl[.gz]) beside {reviews.name}",
            "set data.items=<metadata file>; titles come from it",
        )
    items = read_item_table(require_file(meta, "data.items"), data, bad)
    events = read_events(reviews, data, bad, items, meta)
    events.users = read_user_table(data, reviews.parent, bad)
    events.domain = "book" if "book" in reviews.name.lower() else guess_domain(reviews.name, "product")
    return events


def _candidates(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(_SUFFIXES))


def _reviews_file(path: Path) -> Path | None:
    candidates = []
    if path.is_dir():
        candidates = _candidates(path)
    elif path.is_file() and path.name.lower().endswith(_SUFFIXES):
        candidates = [path]
    for candidate in candidates:
        if candidate.name.lower().startswith("meta"):
            continue
        try:
            keys = header_of(candidate)
        except UserError:
            continue
        if any(user in keys and item in keys for user, item in _KEYS):
            return candidate
    return None


READER = Reader(
    lambda data: is_amazon_reviews(Path(data.path)), read_amazon_reviews, order=40, uses=lambda data: USES
)
