"""The published Amazon windows: columns give what one Python object per event gives.

The files are not part of the repository. GDRT_PUBLISHED_WINDOWS names the folder that holds amazon_office
and amazon_books (`train.csv`, `test.csv`, `id2name4Rec.json`); the default is ../shared/data. Without it the
tests are skipped.
"""

import os
from pathlib import Path

import pytest

from gdrt_ds.config import DataSection
from gdrt_ds.data.corpus import load_corpus, reader_of, train_popularity
from gdrt_ds.data.readers.base import BadRows, Interactions
from gdrt_ds.files import REPOSITORY
from tests.data import reference_windows
from tests.data.test_columns import from_columns

FOLDER = Path(os.environ.get("GDRT_PUBLISHED_WINDOWS", REPOSITORY.parent / "shared" / "data"))
SETS = ["amazon_office", "amazon_books"]


@pytest.fixture(params=SETS)
def section(request):
    folder = FOLDER / request.param
    if not (folder / "train.csv").is_file():
        pytest.skip(
            f"{folder} is not there: the published windows are not ours to pass on; README.md, Your own "
            "data, says where they are, and GDRT_PUBLISHED_WINDOWS names the folder that holds them"
        )
    return DataSection(path=str(folder), on_bad_row="skip")


def carve_the_latest_ninth(splits):
    """valid of files that have none: as large beside train as 0.1 beside 0.8; equal times in file order."""
    train = splits["train"]
    size = round(len(train) / 9)
    latest = set(sorted(range(len(train)), key=lambda place: (train[place].timestamp, place))[-size:])
    splits["valid"] = [sample for place, sample in enumerate(train) if place in latest]
    splits["train"] = [sample for place, sample in enumerate(train) if place not in latest]


def test_ready_made_windows_have_the_splits_and_the_fingerprint_of_the_reference(section):
    found = load_corpus(section)
    windows = reader_of(section).read(section, BadRows(skip=True))
    if "valid" not in windows.splits:
        carve_the_latest_ninth(windows.splits)
    splits = reference_windows._finish_splits(windows, section, [])
    assert {name: list(samples) for name, samples in found.splits.items()} == splits
    wanted = reference_windows.Corpus("windows", windows.domain, windows.items, splits, windows.users, [])
    assert found.fingerprint == reference_windows._fingerprint(wanted)
    assert train_popularity(found) == reference_windows.train_popularity(wanted)
    assert min(len(split) for split in splits.values()) > 1000


@pytest.mark.parametrize("split", ["time", "leave_one_out"])
def test_their_targets_as_a_log_give_the_windows_of_the_reference(section, split):
    windows = reader_of(section).read(section, BadRows(skip=True))
    events = [sample for samples in windows.splits.values() for sample in samples]
    log = Interactions(
        [event.user_id for event in events],
        [event.target for event in events],
        [event.timestamp for event in events],
        None,
        windows.items,
    )
    data = section.model_copy(update={"split": split, "kcore": 2})
    wanted = reference_windows.reference_corpus(log, data)
    found = from_columns(log, data)
    assert found.notes == wanted.notes and found.fingerprint == wanted.fingerprint
    assert train_popularity(found) == reference_windows.train_popularity(wanted)
    for name in ("train", "valid", "test"):
        assert list(found.splits[name]) == wanted.splits[name]
    assert len(wanted.splits["train"]) > 1000
