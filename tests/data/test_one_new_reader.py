"""A new reader is one file: the docs' example is found by its folder, recognised and read."""

from __future__ import annotations

import pytest

from gdrt_ds.config import load_config
from gdrt_ds.data.corpus import load_corpus
from gdrt_ds.errors import UserError
from tests.rooms import EXAMPLES, room_with


@pytest.fixture
def with_example():
    with room_with("gdrt_ds.data.readers", EXAMPLES / "readers"):
        yield


@pytest.fixture
def log(tmp_path):
    titles = [f"Film {k}" for k in range(12)]
    path = tmp_path / "chosen.pairs"
    path.write_text("".join(f"u{k % 5}\t{titles[k % 12]}\n" for k in range(60)), encoding="utf-8")
    return path


@pytest.mark.parametrize("format", ["auto", "pairs"])
def test_the_example_is_found_recognised_and_read(with_example, log, format):
    corpus = load_corpus(load_config(None, [f"data.path={log}", f"data.format={format}"]).data)
    assert len(corpus.items) == 12 and corpus.split("train")[0].user_id.startswith("u")


def test_its_bad_rows_are_told_like_everybody_elses(with_example, log):
    log.write_text(log.read_text() + "no tab here\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"chosen.pairs, line 61, field `title`"):
        load_corpus(load_config(None, [f"data.path={log}"]).data)


def test_without_the_file_the_format_is_unknown_and_the_nearest_is_named(log):
    with pytest.raises(UserError, match="data.format = 'tabel': unknown; did you mean `table`"):
        load_config(None, [f"data.path={log}", "data.format=tabel"])
