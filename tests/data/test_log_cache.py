"""A large log is built once: another start maps it, another setting or a changed file builds it again."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gdrt_ds.config import DataSection, load_config
from gdrt_ds.data import kept, log_cache, window_store
from gdrt_ds.data.columns import WindowTable
from gdrt_ds.data.corpus import Corpus, load_corpus, train_popularity
from gdrt_ds.data.readers import table
from gdrt_ds.errors import UserError
from gdrt_ds.training.preparation import prepare


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A log that counts as large, and the folder of its cache."""
    monkeypatch.setenv("GDRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(log_cache, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(window_store, "SMALLEST_KEPT", 0)
    folder = tmp_path / "log"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [f"u{rng.integers(9)},i{rng.integers(12)},{rng.integers(10**6) / 8}\n" for _ in range(150)]
    (folder / "interactions.csv").write_text("user,item,timestamp\n" + "".join(rows), encoding="utf-8")
    titles = "".join(f"i{k},Ünïque title {k},g|h\n" for k in range(12))
    (folder / "items.csv").write_text("id,title,genres\n" + titles, encoding="utf-8")
    (folder / "users.csv").write_text(
        "user,age\n" + "".join(f"u{k},{k}\n" for k in range(9)), encoding="utf-8"
    )
    return folder


@pytest.fixture
def reads(monkeypatch):
    """How often the interactions were read."""
    found = []
    original = table.read_events
    monkeypatch.setattr(table, "read_events", lambda *given: found.append(1) or original(*given))
    return found


def same(one: Corpus, other: Corpus) -> bool:
    assert one.fingerprint == other.fingerprint
    assert (one.name, one.domain, one.users) == (other.name, other.domain, other.users)
    assert one.items == other.items and list(one.items) == list(other.items)
    assert train_popularity(one) == train_popularity(other)
    return all(list(one.splits[name]) == list(other.splits[name]) for name in one.splits)


def test_the_second_start_maps_what_the_first_has_built(log, reads, monkeypatch):
    data = DataSection(path=str(log))
    first = load_corpus(data)
    second = load_corpus(data)
    assert len(reads) == 1 and same(first, second)
    assert second.notes[:-1] == first.notes and "the log is taken from the cache" in second.notes[-1]
    assert isinstance(second.splits["train"].ends.base, np.memmap)
    monkeypatch.setattr(log_cache, "SMALLEST_BYTES", 1 << 60)
    assert same(load_corpus(data), second)


def test_another_setting_or_a_changed_file_is_built_anew(log, reads):
    data = DataSection(path=str(log))
    first = load_corpus(data)
    assert load_corpus(data.model_copy(update={"history_length": 3})).fingerprint != first.fingerprint
    assert len(reads) == 2
    path = log / "interactions.csv"
    with path.open("a", encoding="utf-8") as stream:
        stream.write("u1,i1,5\n")
    assert load_corpus(data).fingerprint != first.fingerprint
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    load_corpus(data)
    assert len(reads) == 4


def test_processes_that_start_together_build_once(log, reads):
    data = DataSection(path=str(log))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_corpus(data), range(4)))
    assert len(reads) == 1
    assert len({corpus.fingerprint for corpus in found}) == 1


def test_a_build_that_fails_leaves_nothing(log, tmp_path):
    (log / "interactions.csv").write_text("user,item,timestamp\nu1,nowhere,5\n", encoding="utf-8")
    with pytest.raises(UserError, match="item id nowhere has no title"):
        load_corpus(DataSection(path=str(log)))
    left = [path.name for path in (tmp_path / "cache" / "logs").iterdir() if path.suffix != ".lock"]
    assert left == []


def test_a_cache_that_cannot_be_written_is_told_and_does_without(log, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.np, "save", full)
    corpus = load_corpus(DataSection(path=str(log)))
    assert "the log is not kept for other runs" in corpus.notes[-1]
    assert "No space left" in corpus.notes[-1] and isinstance(corpus.splits["train"], WindowTable)


def test_a_broken_folder_is_an_error_with_its_name(log, tmp_path):
    load_corpus(DataSection(path=str(log)))
    (folder,) = (path for path in (tmp_path / "cache" / "logs").iterdir() if path.is_dir())
    data = (folder / "train_ends.npy").read_bytes()
    (folder / "train_ends.npy").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"the cached log {folder} cannot be read"):
        load_corpus(DataSection(path=str(log)))


def test_tokens_are_measured_once_and_their_fingerprint_is_kept(log, tmp_path, monkeypatch):
    settings = [f"data.path={log}", f"run.dir={tmp_path}/run", "model.path=tiny-random"]
    config = load_config(None, [*settings, "prompt.template=plain"])
    first = prepare(config).stores["train"]
    wanted = first.fingerprint
    monkeypatch.setattr(window_store, "_measure", None)
    monkeypatch.setattr(window_store.WindowStore, "_all", None)
    second = prepare(config).stores["train"]
    assert second.fingerprint == wanted
    assert np.array_equal(second.lengths, first.lengths) and np.array_equal(second.kept, first.kept)
    assert np.array_equal(second.target_offsets, first.target_offsets)
    assert second.row(3).tolist() == first.row(3).tolist()
