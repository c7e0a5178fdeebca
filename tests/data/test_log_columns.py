"""Large logs are read as columns: what they give is what reading row by row gives, and so are the errors."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from gdrt_ds.config import DataSection
from gdrt_ds.data.readers import _columns
from gdrt_ds.data.readers.base import BadRows
from gdrt_ds.data.readers.table import read_table
from gdrt_ds.errors import UserError

ITEMS = "item_id,title\n" + "".join(f"{k},Title {k}\n" for k in range(9)) + '"a b",Quoted\né,Accent\n'


@pytest.fixture(autouse=True)
def _quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_columns, "BATCH", 7)


def leave_it_to_the_rows(*given):
    raise _columns.NotPlain("the other way of reading is asked for")


def read(path, monkeypatch, by_columns: bool, **settings):
    """(columns or error text, notes, whether the row reader was asked) of one way of reading."""
    asked = []
    from gdrt_ds.data.readers import table

    columns_reader = _columns.read_columns
    if not by_columns:
        monkeypatch.setattr(_columns, "read_columns", leave_it_to_the_rows)
    original = table._read_rows
    monkeypatch.setattr(table, "_read_rows", lambda *given: asked.append(1) or original(*given))
    bad = BadRows(skip=settings.pop("skip", False))
    try:
        found = read_table(DataSection(path=str(path), **settings), bad)
    except UserError as error:
        return str(error), bad.notes(), bool(asked)
    finally:
        monkeypatch.setattr(table, "_read_rows", original)
        monkeypatch.setattr(_columns, "read_columns", columns_reader)
    users = [found.user_names[user] for user in found.users_of.tolist()]
    names = list(found.items)
    items = [names[item] for item in found.items_of.tolist()]
    times = None if found.times is None else found.times.tolist()
    ratings = None if found.ratings is None else found.ratings.tolist()
    notes = [note for note in found.notes if "read row by row" not in note]
    return (users, items, times, ratings), [*bad.notes(), *notes], bool(asked)


def both(path, monkeypatch, **settings) -> bool:
    """Compares both ways of reading; returns whether the columns were used."""
    wanted, wanted_notes, _ = read(path, monkeypatch, False, **settings)
    found, notes, asked = read(path, monkeypatch, True, **settings)
    assert found == wanted
    assert notes == wanted_notes
    return not asked


def write(tmp_path, text: str, name: str = "interactions.csv"):
    path = tmp_path / name
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "items.csv").write_text(ITEMS, encoding="utf-8")
    return path


HEADER = "user,item,timestamp,rating\n"
GOOD = {
    "numbers": "1,2,100,4\n1,3,200.5,5\n07,8,-3,1\n1.0,4,1e3,2\n",
    "quotes": '"x, y",2,1,4\n"say ""no""","a b",2,5\nNA,3,3,1\nnull,4,4,1\n',
    "spaces and blank lines": " u ,2,1,4\n\nü,é, 2 ,5\n",
    "dates": "u,2,2024-05-01,4\nv,3,2024-05-01T10:00:00Z,5\nw,4,2024-05-01 10:00:00.25,5\n",
    "windows line ends": "u,2,1,4\r\nv,3,2,5\r\n",
    "a newline in a field": '"two\nlines",2,1,4\nv,3,2,5\n',
    "no last newline": "u,2,1,4\nv,3,2,5",
}
BAD = {
    "an empty id": "u,2,1,4\n,3,2,5\nw,4,3,5\n",
    "an id of spaces": "u,2,1,4\n  ,3,2,5\nw,4,3,5\n",
    "an unknown item": "u,2,1,4\nv,77,2,5\n",
    "a time that is no number": "u,2,1,4\nv,3,soon,5\n",
    "an infinite time": "u,2,1,4\nv,3,inf,5\n",
    "a missing time": "u,2,1,4\nv,3,,5\n",
    "a short row": "u,2,1,4\nv,3,2\nw,4,3,5\n",
    "a long row": "u,2,1,4\nv,3,2,5,6\n",
    "only long rows": "u,2,1,4,9\nv,3,2,5,6\n",
    "a short row without the unused column": "u,2,1\n",
}


@pytest.mark.parametrize("case", GOOD)
def test_csv_in_order_is_read_as_columns(tmp_path, monkeypatch, case):
    path = write(tmp_path, HEADER + GOOD[case])
    assert both(path, monkeypatch)
    both(path, monkeypatch, min_rating=3, split="leave_one_out")


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_or_counted_in_the_same_words(tmp_path, monkeypatch, case):
    path = write(tmp_path, HEADER + "a,1,1,1\n" * 20 + BAD[case])
    assert not both(path, monkeypatch)
    both(path, monkeypatch, skip=True)


@pytest.mark.parametrize("name", ["interactions.csv", "interactions.tsv.gz"])
@pytest.mark.parametrize("blank", ["", "\n"])
@pytest.mark.parametrize("skip", [False, True])
def test_rows_that_are_all_longer_than_the_header_do_not_shift_the_columns(
    tmp_path, monkeypatch, name, blank, skip
):
    text = "user,item,timestamp\n" + blank + "".join(f"{k % 3},{k % 5},4,{k}\n" for k in range(20))
    path = write(tmp_path, text if ".csv" in name else text.replace(",", "\t"), name)
    assert not both(path, monkeypatch, skip=skip)
    found, notes, _ = read(path, monkeypatch, True, skip=skip)
    said = notes[0] if skip else found
    assert "4 fields where the header has 3" in said and f"{name}, line {2 + len(blank)}" in said
    assert not skip or found[0] == []


@pytest.mark.parametrize("table", ["items.csv", "users.csv"])
def test_rows_of_other_tables_that_are_longer_than_the_header_are_named(tmp_path, monkeypatch, table):
    path = write(tmp_path, HEADER + GOOD["numbers"])
    text = {"items.csv": "item,title\n1,One,Drama\n2,Two,Drama\n", "users.csv": "user,city\n1,Ulm,3\n"}[table]
    (tmp_path / table).write_text(text)
    found, _, _ = read(path, monkeypatch, True)
    assert f"{table}, line 2, field `(row)`: 3 fields where the header has 2" in found


@pytest.mark.parametrize("skip", [False, True])
def test_a_quote_that_is_never_closed_is_an_error_that_names_its_line(tmp_path, monkeypatch, skip):
    path = write(tmp_path, HEADER + "a,1,1,1\n" * 20 + 'u,2,1,4\n"v,3,2,5\nw,4,3,5\n')
    assert not both(path, monkeypatch, skip=skip)
    assert (
        'interactions.csv, line 23: a cell opens a quote (")' in read(path, monkeypatch, True, skip=skip)[0]
    )
    write(tmp_path, HEADER + GOOD["numbers"])
    (tmp_path / "items.csv").write_text(ITEMS + '90,"Two\nlines"\n91,12" ruler\n92,"Weird Al\n93,T\n')
    line = (ITEMS + "\n\n\n").count("\n") + 1
    assert f"items.csv, line {line}: a cell opens a quote" in read(path, monkeypatch, True, skip=skip)[0]


@pytest.mark.parametrize("name", ["interactions.csv.gz", "interactions.tsv", "interactions.tsv.gz"])
def test_other_endings_are_read_as_columns(tmp_path, monkeypatch, name):
    text = HEADER + GOOD["numbers"]
    if ".tsv" in name:
        text = text.replace(",", "\t")
    assert both(write(tmp_path, text, name), monkeypatch)


def test_a_byte_order_mark_and_repeated_columns_give_what_rows_give(tmp_path, monkeypatch):
    both(write(tmp_path, "\ufeff" + HEADER + GOOD["numbers"]), monkeypatch)
    both(write(tmp_path, "user,item,timestamp,item\nu,1,1,2\n"), monkeypatch)
    both(write(tmp_path, " user , item,timestamp\nu,1,1\n"), monkeypatch)


ROWS = [
    [{"user": "u", "item": 2, "timestamp": 1}, {"user": "v", "item": 3, "timestamp": 2.5}],
    [{"user": 1, "item": "2", "timestamp": "1"}, {"user": 2, "item": "3", "timestamp": "2"}],
    [{"user": "2024-01-01", "item": "2", "timestamp": "2024-01-01"}],
    [{"user": "u", "item": 2, "timestamp": 1}, {"user": "v", "item": 3}],
    [{"user": "u", "item": 2, "timestamp": 1}, {"user": None, "item": 3, "timestamp": 3}],
    [{"user": "u", "item": 2, "timestamp": 1}, {"user": 7, "item": 3, "timestamp": 3}],
    [{"user": "u", "item": 2, "timestamp": True}, {"user": "v", "item": 2, "timestamp": 1}],
    [{"user": ["u"], "item": 2, "timestamp": 1}],
    [
        {"user": "u", "item": 2, "timestamp": 1, "x": {"y": 1}},
        {"user": "v", "item": 3, "timestamp": 1, "x": 2},
    ],
]


@pytest.mark.parametrize("case", range(len(ROWS)))
def test_json_lines_give_what_rows_give(tmp_path, monkeypatch, case):
    text = "".join(json.dumps(row) + "\n" for row in ROWS[case])
    path = write(tmp_path, text, "interactions.jsonl")
    assert both(path, monkeypatch) == (case in (0, 1, 8))
    both(path, monkeypatch, skip=True, split="leave_one_out")


LARGE = [2**53 + 1, 2**53 + 2, 2**63 + 5, 2**63 + 6]


@pytest.mark.parametrize("ids", [LARGE, [*LARGE[2:], 11], [*LARGE[:2], 1.5]], ids=["all", "64 bits", "float"])
@pytest.mark.parametrize("role", ["user", "item"])
def test_ids_that_no_float_holds_are_read_exactly(tmp_path, monkeypatch, ids, role):
    other = {"user": "item", "item": "user"}[role]
    text = "".join(json.dumps({role: ids[k % len(ids)], other: 2, "timestamp": k}) + "\n" for k in range(12))
    path = write(tmp_path, text, "interactions.jsonl")
    with open(tmp_path / "items.csv", "a", encoding="utf-8") as stream:
        stream.writelines(f"{name},Large {name}\n" for name in ids)
    assert not both(path, monkeypatch)
    users, items, _, _ = read(path, monkeypatch, True)[0]
    assert list(dict.fromkeys(users if role == "user" else items)) == [str(name) for name in ids]


def test_a_torn_last_line_is_named(tmp_path, monkeypatch):
    whole = "".join(json.dumps(row) + "\n" for row in ROWS[0] * 20)
    path = write(tmp_path, whole[:-9], "interactions.jsonl")
    assert not both(path, monkeypatch)
    assert "interactions.jsonl, line 40, field `(row)`: not valid JSON" in read(path, monkeypatch, True)[0]


@pytest.mark.parametrize("seed", range(4))
def test_parquet_gives_what_rows_give_whatever_its_types(tmp_path, monkeypatch, seed):
    import pyarrow
    import pyarrow.parquet

    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 5, 40), rng.integers(0, 9, 40)
    times = rng.integers(0, 10**9, 40)
    kinds = (
        (pyarrow.array(users), pyarrow.array(items, pyarrow.int32()), pyarrow.array(times)),
        (pyarrow.array(users.astype(float)), pyarrow.array(items), pyarrow.array(times / 7)),
        (
            pyarrow.array(users.astype(str)).dictionary_encode(),
            pyarrow.array(items.astype(str), pyarrow.large_string()),
            pyarrow.array(times, pyarrow.timestamp("s")),
        ),
        (
            pyarrow.array([None, *users[1:].tolist()]),
            pyarrow.array(items),
            pyarrow.array(times.astype("M8[ms]")),
        ),
    )
    path = write(tmp_path, "", "interactions.parquet")
    table = pyarrow.table(dict(zip(("user", "item", "timestamp"), kinds[seed], strict=True)))
    pyarrow.parquet.write_table(table, path)
    assert both(path, monkeypatch) == (seed < 3)


@pytest.mark.parametrize("role", ["user", "item"])
def test_an_id_that_is_not_a_number_in_parquet_is_a_bad_row(tmp_path, monkeypatch, role):
    import pyarrow
    import pyarrow.parquet

    path = write(tmp_path, "", "interactions.parquet")
    columns = {"user": [1.0, 2.0, 3.0], "item": [2.0, 3.0, 4.0], "timestamp": [1, 2, 3]}
    columns[role][1] = float("nan")
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert not both(path, monkeypatch)
    assert f"interactions.parquet, line 2, field `{role}`: empty id" in read(path, monkeypatch, True)[0]
    (users, items, _, _), notes, _ = read(path, monkeypatch, True, skip=True)
    assert (users, items) == (["1", "3"], ["2", "4"]) and ": 1 (first: " in notes[0]


def test_blank_ids_of_items_and_users_are_bad_rows(tmp_path, monkeypatch):
    path = write(tmp_path, HEADER + GOOD["numbers"])
    (tmp_path / "users.csv").write_text("user,city\n1,Ulm\n  ,Bonn\n")
    assert "users.csv, line 3, field `user`: empty id" in read(path, monkeypatch, True)[0]
    (tmp_path / "users.csv").unlink()
    (tmp_path / "items.csv").write_text(ITEMS + " ,Blank\n")
    assert (
        f"items.csv, line {ITEMS.count(chr(10)) + 1}, field `item_id`: empty id"
        in (read(path, monkeypatch, True)[0])
    )


def test_a_mutilated_parquet_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    path = write(tmp_path, "", "interactions.parquet")
    columns = {"user": [1] * 5000, "item": [2] * 5000, "timestamp": list(range(5000))}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    data = bytearray(path.read_bytes())
    data[200:600] = b"\0" * 400
    path.write_bytes(bytes(data))
    found, _, _ = read(path, monkeypatch, True)
    assert "interactions.parquet: cannot be read" in found


@pytest.mark.parametrize("folder", ["plain", "shop[1]"])
@pytest.mark.parametrize("name", ["log[1].csv", "log*.csv", "log?.csv"])
def test_a_name_that_reads_like_a_pattern_is_the_name_of_that_file_alone(tmp_path, monkeypatch, folder, name):
    place = tmp_path / folder
    place.mkdir()
    write(place, "user,item,timestamp\nother,2,1\n", "log1.csv")
    path = write(place, "user,item,timestamp\nmine,2,1\n", name)
    assert both(path, monkeypatch)
    assert read(path, monkeypatch, True)[0][0] == ["mine"]
