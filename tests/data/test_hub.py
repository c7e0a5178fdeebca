"""Data sets of the hub: the library finds one that was loaded before without a network."""

import json
import shutil

import pytest
from datasets import Dataset, load_dataset

from gdrt_ds.config import DataSection
from gdrt_ds.data import corpus
from gdrt_ds.data.looking import look_at
from gdrt_ds.data.readers import _hub
from gdrt_ds.data.readers.base import BadRows
from gdrt_ds.errors import UserError

EVENTS = {
    "user_id": [f"u{n % 6}" for n in range(60)],
    "parent_asin": [f"i{(n * 7) % 11}" for n in range(60)],
    "timestamp": list(range(60)),
}
ITEMS = {"parent_asin": [f"i{n}" for n in range(11)], "title": [f"Item {n}" for n in range(11)]}


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """Puts data sets where the library keeps those that it has loaded from the hub."""
    monkeypatch.setenv("GDRT_CACHE", str(tmp_path / "cache"))
    _hub._files.cache_clear()

    def publish(name: str, config: str = "default", **splits: dict) -> None:
        from gdrt_ds.files import cache_folder

        owner, short = name.split("/")
        built = tmp_path / "built" / f"{short}-{config}"
        sources = {}
        for split, columns in splits.items():
            sources[split] = str(tmp_path / f"{short}-{split}-{config}.parquet")
            Dataset.from_dict(columns).to_parquet(sources[split])
        load_dataset("parquet", data_files=sources, cache_dir=str(built))
        place = next(built.glob("parquet/*/*/*/dataset_info.json")).parent
        target = cache_folder() / "datasets" / f"{owner}___{short}" / config / "0.0.0" / place.name
        shutil.copytree(place, target)
        for file in target.glob("parquet-*.arrow"):
            file.rename(target / file.name.replace("parquet-", f"{short}-", 1))
        info = target / "dataset_info.json"
        about = json.loads(info.read_text())
        info.write_text(json.dumps({**about, "dataset_name": short, "config_name": config}))

    yield publish
    _hub._files.cache_clear()


def windows_of(found):
    return {split: [(s.user_id, s.history, s.target) for s in found.splits[split]] for split in found.splits}


def as_csv(folder, name, columns):
    rows = zip(*columns.values())
    text = ",".join(columns) + "\n" + "\n".join(",".join(map(str, row)) for row in rows) + "\n"
    (folder / name).write_text(text)


def test_a_log_of_the_hub_gives_the_windows_of_the_same_files(hub, tmp_path):
    hub("shop/reviews", full=EVENTS)
    hub("shop/products", train=ITEMS)
    found = corpus.load_corpus(DataSection(path="shop/reviews", items="shop/products", min_history=2))
    (tmp_path / "files").mkdir()
    as_csv(tmp_path / "files", "interactions.csv", EVENTS)
    as_csv(tmp_path / "files", "items.csv", ITEMS)
    wanted = corpus.load_corpus(DataSection(path=str(tmp_path / "files"), min_history=2))
    assert windows_of(found) == windows_of(wanted) and found.fingerprint == wanted.fingerprint
    assert found.name == "shop/reviews"


def test_all_splits_of_a_log_are_one_log(hub):
    halves = [{name: values[k::2] for name, values in EVENTS.items()} for k in (0, 1)]
    hub("shop/reviews", train=halves[0], test=halves[1])
    hub("shop/products", "books", train=ITEMS)
    section = DataSection(path="shop/reviews", items="shop/products:books", format="table", min_history=2)
    found = corpus.load_corpus(section)
    assert sum(len(split) for split in found.splits.values()) == 60 - 6 * 2


def test_rows_of_the_hub_are_recognised_and_keep_their_splits(hub):
    rows = {"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"]}
    hub("owner/rows", train=rows, validation={k: v[:1] for k, v in rows.items()})
    section = DataSection(path="owner/rows")
    reader = corpus.reader_of(section)
    assert reader.supervised
    found = reader.read(_hub.on_this_machine(section), BadRows(skip=False))
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 3, "valid": 1, "test": 0}


def test_windows_of_the_hub_keep_their_splits(hub):
    windows = {
        "user_id": ["u1", "u2"],
        "history_item_id": [["1", "2"], ["2", "3"]],
        "item_id": ["3", "1"],
        "history_item_title": [["One", "Two"], ["Two", "Three"]],
        "item_title": ["Three", "One"],
    }
    hub("owner/windows", train=windows, valid=windows, test=windows)
    found = corpus.load_corpus(DataSection(path="owner/windows"))
    assert windows_of(found)["test"] == [("u1", ("1", "2"), "3"), ("u2", ("2", "3"), "1")]
    assert found.items["3"].title == "Three"


def test_a_bad_row_names_the_data_set_and_the_row(hub):
    broken = {**EVENTS, "timestamp": ["7"] * 20 + ["yesterday"] + ["8"] * 39}
    hub("shop/reviews", train=broken)
    hub("shop/products", train=ITEMS)
    with pytest.raises(UserError, match=r"reviews\.parquet, line 21, field `timestamp`: .*yesterday"):
        corpus.load_corpus(DataSection(path="shop/reviews", items="shop/products"))


def test_what_the_hub_does_not_give_is_a_clear_error(hub, capsys):
    for section in (DataSection(path="nobody/nothing"), DataSection(path="nobody/nothing", format="sft")):
        with pytest.raises(UserError, match="data.path=nobody/nothing: no such file or folder, and the hub"):
            corpus.load_corpus(section)
    said = capsys.readouterr().out
    assert "data.path=nobody/nothing: no path of this machine, so the Hugging Face hub is asked" in said
    hub("shop/reviews", train=EVENTS)
    with pytest.raises(UserError, match="data.items=nobody/items: no such file"):
        corpus.load_corpus(DataSection(path="shop/reviews", items="nobody/items"))


def test_rows_without_a_train_split_are_refused_with_the_splits_that_are_there(hub):
    hub("owner/rows", test={"prompt": ["a"], "completion": ["x"]})
    with pytest.raises(UserError, match="no split is named train; there are test"):
        corpus.reader_of(DataSection(path="owner/rows"))


def test_two_splits_that_are_both_valid_are_refused(hub):
    rows = {"prompt": ["a"], "completion": ["x"]}
    hub("owner/rows", train=rows, val=rows, validation=rows)
    with pytest.raises(UserError, match="owner/rows: two of its splits are one of train, valid and test"):
        corpus.reader_of(DataSection(path="owner/rows"))


def test_init_names_the_data_set_as_it_was_given(hub):
    hub("shop/reviews", train={**EVENTS, "title": [f"T {item}" for item in EVENTS["parent_asin"]]})
    seen = look_at("shop/reviews")
    assert (seen.format, seen.path, seen.items) == ("table", "shop/reviews", "shop/reviews")


def test_a_misspelt_path_into_a_folder_of_this_machine_asks_no_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_hub, "load", None)
    with pytest.raises(UserError, match="data.path=data/shoop: no such file or folder\n"):
        corpus.load_corpus(DataSection(path="data/shoop"))
