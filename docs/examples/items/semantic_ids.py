"""Gives every item a semantic id such as `<a_3><b_1><c_7>`, from who interacts with what.

    python docs/examples/items/semantic_ids.py DATA OUTPUT [--codes 16]

DATA has interactions.csv (user_id,item_id,timestamp) and items.csv (item_id,title). OUTPUT gets the same
interactions, and the items with a column semantic_id. Items are points: the singular vectors of the table
of users and items. The first code is the nearest of 16 centres, the second that of what is left of the point
without its centre, and so on. Items with the same codes share an id.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import svds

LEVELS = "abc"
DIMENSIONS = 16


def read(path: Path, *columns: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise SystemExit(f"{path} has no column {missing[0]}: rename it to that")
    return rows


def points(events: list[dict[str, str]], items: list[str]) -> np.ndarray:
    """float64[items, dimensions]."""
    users = {user: row for row, user in enumerate(dict.fromkeys(event["user_id"] for event in events))}
    place = {item: column for column, item in enumerate(items)}
    rows = [users[event["user_id"]] for event in events]
    columns = [place[event["item_id"]] for event in events]
    table = coo_matrix((np.ones(len(events)), (rows, columns)), (len(users), len(items))).tocsr()
    size = min(DIMENSIONS, min(table.shape) - 1)
    _, values, vectors = svds(table, k=size, random_state=0)
    return vectors.T * values


def semantic_ids(found: np.ndarray, codes: int) -> list[str]:
    """One text per item: a code at every level, coarse before fine."""
    left = found.copy()
    texts = [""] * len(found)
    for level in LEVELS:
        centres, nearest = kmeans2(left, min(codes, len(left)), seed=0, minit="++", missing="warn")
        left -= centres[nearest]
        texts = [f"{text}<{level}_{code}>" for text, code in zip(texts, nearest)]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--codes", type=int, default=16, help="centres of each level")
    options = parser.parse_args()
    items = read(options.data / "items.csv", "item_id")
    events = read(options.data / "interactions.csv", "user_id", "item_id")
    texts = semantic_ids(points(events, [item["item_id"] for item in items]), options.codes)
    options.output.mkdir(parents=True, exist_ok=True)
    shutil.copy(options.data / "interactions.csv", options.output)
    with open(options.output / "items.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*items[0], "semantic_id"])
        writer.writeheader()
        for item, text in zip(items, texts):
            writer.writerow({**item, "semantic_id": text})
    print(f"{len(items)} items, {len(set(texts))} different semantic ids")


if __name__ == "__main__":
    main()
