"""Corpus: each format gives the windows that its files describe, each bad row an error that names it."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest

from gdrt_ds.config import DataSection
from gdrt_ds.data.corpus import load_corpus, train_popularity
from gdrt_ds.data.interactions import k_core, time_cuts
from gdrt_ds.data.readers.base import clean_title, parse_genres, parse_list, parse_number
from gdrt_ds.errors import UserError


def write_windows(folder, train=None, valid=None, test=None, names=None):
    """A folder of the MSL/LBR family; returns it."""
    row = '7,"[1, 2, 3]",100'
    files = {
        "train.csv": train if train is not None else [row, '8,"[2, 3, 1, 4]",101'],
        "valid.csv": valid,
        "test.csv": test if test is not None else [row],
    }
    for name, rows in files.items():
        if rows is not None:
            (folder / name).write_text("\n".join(["user_id,item_ids,timestamp", *rows]) + "\n")
    names = names if names is not None else {"1": "One", "2": "Two &amp; a half", "3": "Three", "4": "Four"}
    (folder / "id2name4Rec.json").write_text(json.dumps(names))
    return folder


def write_table(folder, interactions=None, items=None):
    header = "user_id,item_id,timestamp,rating"
    rows = (
        interactions
        if interactions is not None
        else ["a,1,10,5", "a,2,20,4", "b,2,15,1", "a,3,30,5", "b,3,25,4", "b,1,40,5"]
    )
    (folder / "interactions.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "items.csv").write_text(
        items or "item_id,title,provider,genres\n1,One,P,x|y\n2,Two,P,\n3,Three,,z\n"
    )
    return folder


def section(path, **settings):
    return DataSection(path=str(path), **settings)


def targets(samples):
    return [(s.user_id, s.history, s.target) for s in samples]


def test_msl_windows_become_history_and_target(tmp_path):
    corpus = load_corpus(section(write_windows(tmp_path, valid=['9,"[4, 1]",5'])))
    assert targets(corpus.split("train")) == [("7", ("1", "2"), "3"), ("8", ("2", "3", "1"), "4")]
    assert corpus.items["2"].title == "Two & a half"
    assert corpus.split("valid")[0].timestamp == 5.0
    assert [s.sample_id for s in corpus.split("train")] == [0, 1]


def test_python_style_lists_and_string_ids_are_read(tmp_path):
    write_windows(
        tmp_path,
        train=["""7,"['x1', 'x2']",100"""],
        test=["""7,"['x1', 'x2']",100"""],
        names={"x1": "One", "x2": "Two"},
    )
    assert targets(load_corpus(section(tmp_path)).split("train")) == [("7", ("x1",), "x2")]


def test_history_is_cut_to_its_newest_items_and_short_ones_are_counted(tmp_path):
    corpus = load_corpus(
        section(write_windows(tmp_path, valid=['9,"[4, 3, 1]",5']), history_length=2, min_history=2)
    )
    assert targets(corpus.split("train"))[1] == ("8", ("3", "1"), "4")
    write_windows(tmp_path, train=['7,"[1, 2]",1', '7,"[1, 2, 3]",2'], valid=['9,"[4, 3, 1]",5'])
    corpus = load_corpus(section(tmp_path, min_history=2))
    assert len(corpus.split("train")) == 1
    assert any("train: 1 of 2 windows" in note for note in corpus.notes)


def test_missing_valid_file_is_carved_from_the_latest_train_windows(tmp_path):
    rows = [f'{u},"[1, 2, 3]",{t}' for u, t in enumerate([5, 1, 9, 2, 9, 3, 4, 6, 7])]
    corpus = load_corpus(section(write_windows(tmp_path, train=rows)))
    assert [s.user_id for s in corpus.split("valid")] == ["4"]  # two windows at time 9: the later row
    assert len(corpus.split("train")) == 8
    assert any("latest 1 of 9 train windows serve as valid" in note for note in corpus.notes)


def test_train_file_names_another_train_file(tmp_path):
    write_windows(tmp_path, valid=['9,"[4, 3, 1]",5'])
    (tmp_path / "train_1.csv").write_text('user_id,item_ids,timestamp\n8,"[4, 2]",3\n')
    assert targets(load_corpus(section(tmp_path, train_file="train_1.csv")).split("train")) == [
        ("8", ("4",), "2")
    ]
    with pytest.raises(UserError, match="data.train_file.*train_2.csv: no such file") as caught:
        load_corpus(section(tmp_path, train_file="train_2.csv"))
    assert "train_1.csv" in caught.value.problem


def test_bigrec_columns_with_titles_need_no_item_table(tmp_path):
    text = (
        "user_id,history_item_title,item_title,history_item_id,item_id,timestamp,category\n"
        "u1,\"['Alpha &amp; co', 'Beta']\",Gamma,\"['a', 'b']\",c,3,toys\n"
    )
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.csv").write_text(text)
    corpus = load_corpus(section(tmp_path))
    assert targets(corpus.split("train")) == [("u1", ("a", "b"), "c")]
    assert [corpus.items[i].title for i in "abc"] == ["Alpha & co", "Beta", "Gamma"]
    assert corpus.split("train")[0].labels == {"category": "toys"}


@pytest.mark.parametrize(
    "row, message",
    [
        ('7,"[1, 2",100', r"train.csv, line 3, field `item_ids`: malformed list"),
        ("7,\"__import__('os').getcwd()\",100", r"line 3, field `item_ids`: malformed list"),
        ('7,"[1, [2]]",100', r"line 3, field `item_ids`: list"),
        ('7,"[3]",100', r"line 3, field `item_ids`: empty history"),
        ('7,"[]",100', r"line 3, field `item_ids`: empty history"),
        ('7,"[1, 2, 99]",100', r"line 3, field `target`: item id 99 has no title"),
        ('7,"[99, 2, 1]",100', r"line 3, field `history`: item id 99 has no title"),
        ('7,"[1, 2, 3]",soon', r"line 3, field `timestamp`: 'soon' is not a number"),
        ('7,"[1, 2, 3]",nan', r"line 3, field `timestamp`: 'nan' is not finite"),
        (',"[1, 2, 3]",1', r"line 3, field `user_id`: empty user id"),
        ('7,"[1, 2, 3]"', r"line 3, field `\(row\)`: 2 fields where the header has 3"),
    ],
)
def test_a_bad_window_is_named_by_file_line_and_field_or_counted(tmp_path, row, message):
    write_windows(tmp_path, train=['7,"[1, 2, 3]",1', row], valid=['9,"[4, 3, 1]",5'])
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(section(tmp_path))
    assert "data.on_bad_row=skip" in caught.value.fix
    corpus = load_corpus(section(tmp_path, on_bad_row="skip"))
    kept_without_item = "[99, 2, 1]" in row
    assert len(corpus.split("train")) == 1 + kept_without_item
    assert any(
        note.startswith("train.csv:") and ": 1 (first: train.csv, line 3" in note for note in corpus.notes
    )
    if kept_without_item:
        assert targets(corpus.split("train"))[1] == ("7", ("2",), "1")


@pytest.mark.parametrize("role", ["timestamp", "rating"])
def test_a_renamed_column_that_is_not_there_is_an_error_where_it_is_optional_too(tmp_path, role):
    write_table(tmp_path)
    with pytest.raises(UserError, match=f"data.columns.{role}=wen: .* no such column; it has user_id,"):
        load_corpus(section(tmp_path, split="leave_one_out", columns={role: "wen"}))


@pytest.mark.parametrize("role", ["timestamp", "item"])
def test_a_renamed_column_that_windows_do_not_have_is_an_error(tmp_path, role):
    write_windows(tmp_path)
    with pytest.raises(
        UserError, match=f"data.columns.{role}=wen: train.csv has no such column; it has user"
    ):
        load_corpus(section(tmp_path, columns={role: "wen"}))


def test_a_column_of_the_item_table_is_not_looked_for_in_the_windows(tmp_path):
    write_windows(tmp_path)
    (tmp_path / "id2name4Rec.json").unlink()
    (tmp_path / "items.csv").write_text("asin,label\n1,One\n2,Two\n3,Three\n4,Four\n")
    corpus = load_corpus(section(tmp_path, columns={"item": "asin", "title": "label"}))
    assert corpus.items["4"].title == "Four" and len(corpus.splits["test"]) == 1


def test_missing_files_columns_and_titles_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match="no such file or folder") as caught:
        load_corpus(section(tmp_path / "nowhere"))
    assert "planted, ml-100k" in caught.value.fix
    write_windows(tmp_path)
    (tmp_path / "id2name4Rec.json").unlink()
    with pytest.raises(UserError, match="no item titles"):
        load_corpus(section(tmp_path))
    write_windows(tmp_path)
    (tmp_path / "test.csv").unlink()
    with pytest.raises(UserError, match="test.csv: no such file"):
        load_corpus(section(tmp_path))
    write_windows(tmp_path)
    (tmp_path / "train.csv").write_text("user_id,things,timestamp\n1,2,3\n")
    with pytest.raises(UserError, match="missing column `item_ids`; it has user_id, things, timestamp"):
        load_corpus(section(tmp_path))


def test_empty_splits_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match="test split of .* is empty"):
        load_corpus(section(write_windows(tmp_path, test=[])))
    with pytest.raises(UserError, match="train split of .* is empty"):
        load_corpus(section(write_windows(tmp_path, train=[])))
    corpus = load_corpus(section(write_windows(tmp_path, valid=[])))
    with pytest.raises(UserError, match="valid split"):
        corpus.split("valid")
    with pytest.raises(UserError, match="no such split"):
        corpus.split("dev")


def test_unreadable_files_are_clear_errors(tmp_path):
    write_windows(tmp_path)
    (tmp_path / "train.csv").write_bytes(b"user_id,item_ids,timestamp\n\xff\xfe\x00,1,2\n")
    with pytest.raises(UserError, match="train.csv: cannot be read"):
        load_corpus(section(tmp_path))
    write_windows(tmp_path)
    (tmp_path / "id2name4Rec.json").write_text("{broken")
    with pytest.raises(UserError, match="id2name4Rec.json: not valid JSON"):
        load_corpus(section(tmp_path))
    broken = tmp_path / "reviews.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"user_id": "a", "item_id": "1", "timestamp": 1}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="reviews.jsonl.gz: cannot be read"):
        load_corpus(section(broken, format="table", items=str(write_table(tmp_path) / "items.csv")))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load_corpus(section(tmp_path / "bad.parquet", items=str(tmp_path / "items.csv")))


def test_table_windows_follow_time_and_split_by_time(tmp_path):
    corpus = load_corpus(section(write_table(tmp_path), split_ratio=(0.5, 0.25, 0.25)))
    assert targets(corpus.split("train")) == [("a", ("1",), "2"), ("b", ("2",), "3")]
    assert targets(corpus.split("valid")) == [("a", ("1", "2"), "3")]
    assert targets(corpus.split("test")) == [("b", ("2", "3"), "1")]
    assert (
        corpus.items["1"].provider == "P"
        and corpus.items["1"].genres == ("x", "y")
        and corpus.items["3"].provider is None
    )


def test_leave_one_out_holds_back_the_last_two_targets_of_each_user(tmp_path):
    rows = [f"{user},{item},{time},5" for user in "ab" for time, item in enumerate((1, 2, 3, 1, 2))]
    corpus = load_corpus(section(write_table(tmp_path, rows), split="leave_one_out"))
    assert targets(corpus.split("test")) == [
        ("a", ("1", "2", "3", "1"), "2"),
        ("b", ("1", "2", "3", "1"), "2"),
    ]
    assert {s.target for s in corpus.split("valid")} == {"1"} and len(corpus.split("train")) == 4


def test_min_rating_and_kcore_leave_out_and_count(tmp_path):
    rows = [
        f"{user},{item},{time},{rating}"
        for time, (user, item, rating) in enumerate(
            [
                ("a", 1, 5),
                ("b", 1, 5),
                ("a", 2, 5),
                ("b", 2, 5),
                ("a", 3, 2),
                ("b", 3, 5),
                ("c", 3, 5),
                ("a", 1, 4),
                ("b", 2, 4),
                ("a", 2, 4),
                ("b", 1, 4),
            ]
        )
    ]
    corpus = load_corpus(section(write_table(tmp_path, rows), min_rating=4, kcore=2))
    assert "3" not in corpus.items and all(
        "3" not in (*s.history, s.target) for split in corpus.splits.values() for s in split
    )
    assert any("1 of 11 interactions are rated below data.min_rating=4" in n for n in corpus.notes)
    assert any("2 of 10 interactions are outside the 2-core" in n for n in corpus.notes)
    with pytest.raises(UserError, match="no interaction is left"):
        load_corpus(section(tmp_path, kcore=50))


def test_kcore_repeats_until_nothing_changes():
    users = np.array([0, 0, 1, 1, 2, 2])
    items = np.array([0, 1, 0, 1, 1, 2])  # item 2 has one row; then user 2 has one row; then 0 and 1 stay
    assert k_core(users, items, np.arange(6), 2).tolist() == [0, 1, 2, 3]


def test_equal_timestamps_keep_the_order_of_the_file_and_are_noted(tmp_path):
    rows = ["a,3,5,5", "a,1,5,5", "a,2,5,5", "b,1,1,5", "b,2,2,5", "b,3,3,5"]
    corpus = load_corpus(section(write_table(tmp_path, rows), split_ratio=(0.75, 0, 0.25)))
    assert targets(corpus.split("test")) == [("a", ("3", "1"), "2")]
    assert any("2 of 4 neighbouring interactions of a user share their timestamp" in n for n in corpus.notes)


def test_lines_that_are_there_twice_are_counted(tmp_path):
    rows = ["a,1,1,5", "a,2,2,5", "a,3,3,5", "a,1,4,5", "b,1,1,5", "b,2,1,5", "b,2,4,5"]
    notes = load_corpus(section(write_table(tmp_path, rows), split="leave_one_out")).notes
    assert not any("repeat another one" in note for note in notes)  # the same item later is no repetition
    twice = load_corpus(section(write_table(tmp_path, rows + rows[:4]), split="leave_one_out"))
    assert any("4 of 11 interactions repeat another one: the same user, item" in n for n in twice.notes)


def test_renamed_columns_and_other_file_types_give_the_same_corpus(tmp_path):
    half = (0.5, 0.25, 0.25)
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    expected = load_corpus(section(write_table(tmp_path), split_ratio=half)).fingerprint
    table = pyarrow.csv.read_csv(tmp_path / "interactions.csv")
    pyarrow.parquet.write_table(table, tmp_path / "events.parquet")
    with open(tmp_path / "events.jsonl", "w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    with gzip.open(tmp_path / "events.tsv.gz", "wt") as stream:
        stream.write(
            "who\twhat\twhen\trating\n"
            + "".join(f"{r['user_id']}\t{r['item_id']}\t{r['timestamp']}\t5\n" for r in table.to_pylist())
        )
    items = str(tmp_path / "items.csv")
    assert (
        load_corpus(section(tmp_path / "events.parquet", items=items, split_ratio=half)).fingerprint
        == expected
    )
    assert (
        load_corpus(section(tmp_path / "events.jsonl", items=items, split_ratio=half)).fingerprint == expected
    )
    renamed = {"user": "who", "item": "what", "timestamp": "when"}
    assert (
        load_corpus(
            section(tmp_path / "events.tsv.gz", items=items, columns=renamed, split_ratio=half)
        ).fingerprint
        == expected
    )
    with pytest.raises(UserError, match="data.columns.user=whom.*has no such column") as caught:
        load_corpus(section(tmp_path / "events.tsv.gz", items=items, columns={**renamed, "user": "whom"}))
    assert "`who`" in caught.value.fix
    with pytest.raises(UserError, match="data.columns.usr: unknown column role") as caught:
        load_corpus(section(tmp_path, columns={"usr": "who"}))
    assert "`user`" in caught.value.fix


@pytest.mark.parametrize(
    "row, message",
    [
        ("a,9,50,5", r"interactions.csv, line 3, field `item_id`: item id 9 has no title in items.csv"),
        ("a,4,50,5", r"line 3, field `item_id`: item id 4 has no title"),
        ("a,1,later,5", r"line 3, field `timestamp`: 'later' is not a number"),
        ("a,1,50,good", r"line 3, field `rating`: 'good' is not a number"),
        (",1,50,5", r"line 3, field `user_id`: empty id"),
        ("a,1,50", r"line 3, field `\(row\)`: 3 fields where the header has 4"),
    ],
)
def test_a_bad_table_row_is_named_or_counted(tmp_path, row, message):
    good = [f"u,{item},{time},5" for time, item in enumerate((1, 2, 3, 1, 2, 3))]
    write_table(tmp_path, [good[0], row, *good[1:]], "item_id,title\n1,One\n2,Two\n3,Three\n4,\n")
    with pytest.raises(UserError, match=message):
        load_corpus(section(tmp_path, min_rating=1, split="leave_one_out"))
    corpus = load_corpus(section(tmp_path, min_rating=1, split="leave_one_out", on_bad_row="skip"))
    assert sum(map(len, corpus.splits.values())) == 5
    assert any("interactions.csv: rows left out" in n and ": 1 (first" in n for n in corpus.notes)


def test_a_time_split_needs_timestamps_and_iso_dates_are_timestamps(tmp_path):
    (tmp_path / "items.csv").write_text("id,title\n1,One\n2,Two\n")
    (tmp_path / "interactions.csv").write_text("user,item\na,1\na,2\na,1\na,2\n")
    with pytest.raises(UserError, match="missing column for `timestamp`"):
        load_corpus(section(tmp_path))
    corpus = load_corpus(section(tmp_path, split="leave_one_out"))
    assert corpus.split("test")[0].timestamp is None and any(
        "order of the file stands for time" in n for n in corpus.notes
    )
    assert parse_number("1970-01-02") == 86400.0 and parse_number("1970-01-01T00:00:10Z") == 10.0


def test_all_columns_that_a_table_lacks_are_named_at_once_with_the_setting_to_give(tmp_path):
    (tmp_path / "items.csv").write_text("sku,label\n1,One\n2,Two\n")
    (tmp_path / "interactions.csv").write_text("customer,sku,clock\na,1,1\na,2,2\na,1,3\na,2,4\n")
    with pytest.raises(
        UserError, match="items.csv: missing columns for `item`, `title`; it has sku"
    ) as caught:
        load_corpus(section(tmp_path))
    assert '"data.columns={item: <column>, title: <column>}"' in caught.value.fix
    columns = {"item": "sku", "title": "label"}
    with pytest.raises(UserError, match="interactions.csv: missing columns for `user`, `timestamp`; it has"):
        load_corpus(section(tmp_path, columns=columns))
    with pytest.raises(UserError, match="interactions.csv: missing column for `user`; it has customer"):
        load_corpus(section(tmp_path, columns=columns, split="leave_one_out"))


@pytest.mark.parametrize("chosen, told", [({}, 1), ({"min_rating": 4}, 0)])
def test_ratings_that_choose_nothing_are_told(tmp_path, chosen, told):
    rows = [f"u{user},{item},{10 * item + user},5" for user in range(6) for item in (1, 2, 3)]
    corpus = load_corpus(section(write_table(tmp_path, rows), split_ratio=(0.5, 0.25, 0.25), **chosen))
    assert sum("every interaction counts as liked" in note for note in corpus.notes) == told
    assert sum("data.min_rating=4" in note for note in corpus.notes) == 1


def test_user_attributes_come_along(tmp_path):
    write_table(tmp_path)
    (tmp_path / "users.csv").write_text("user_id,gender,age\na,F,30\nb,M,40\nz,F,1\n")
    assert load_corpus(section(tmp_path, split_ratio=(0.5, 0.25, 0.25))).users == {
        "a": {"gender": "F", "age": "30"},
        "b": {"gender": "M", "age": "40"},
    }


def test_limits_are_seeded_samples_in_order(tmp_path):
    rows = [f'{u},"[1, 2, 3]",{u}' for u in range(100)]
    write_windows(tmp_path, train=rows, valid=rows, test=rows)
    first, again = (load_corpus(section(tmp_path, limit_train=10, limit_test=5)) for _ in range(2))
    other = load_corpus(section(tmp_path, limit_train=10, limit_test=5, sample_seed=1))
    users = [int(s.user_id) for s in first.split("train")]
    assert (
        users == sorted(users)
        and len(set(users)) == 10
        and len(first.split("test")) == 5
        and len(first.split("valid")) == 100
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert [s.sample_id for s in first.split("train")] == list(range(10))
    assert any("seeded sample of 10 of 100" in n for n in first.notes)


def test_fingerprint_changes_with_titles_and_with_targets(tmp_path):
    prints = [
        load_corpus(section(write_windows(tmp_path))).fingerprint,
        load_corpus(
            section(write_windows(tmp_path, names={"1": "One", "2": "Two", "3": "Three", "4": "Four"}))
        ).fingerprint,
        load_corpus(section(write_windows(tmp_path, test=['7,"[1, 2, 4]",100']))).fingerprint,
    ]
    assert len(set(prints)) == 3


def test_popularity_counts_an_interaction_once_however_many_windows_repeat_it(tmp_path):
    sequence = [1, 2, 3, 2, 4, 1, 3, 3, 2]
    rows = [f'7,"{sequence[max(0, k - 3) : k + 1]}",{5 if k < 4 else k}' for k in range(1, len(sequence))]
    rows[1], rows[2] = rows[2], rows[1]  # equal times: any order
    corpus = load_corpus(
        section(
            write_windows(tmp_path, train=[*rows, '8,"[4, 1]",9'], valid=['9,"[4, 3, 1]",5']),
            history_length=3,
        )
    )
    assert train_popularity(corpus) == Counter(map(str, sequence)) + Counter("41")


def test_popularity_of_a_table_is_its_train_interactions(tmp_path):
    import random

    rng = random.Random(0)
    rows = [f"u{rng.randrange(6)},{rng.randrange(1, 4)},{t // 3},5" for t in range(300)]
    corpus = load_corpus(section(write_table(tmp_path, rows), split_ratio=(0.9, 0, 0.1), history_length=8))
    per_user = {}
    for row in rows:
        user, item, *_ = row.split(",")
        per_user.setdefault(user, []).append(item)
    in_test = Counter(s.user_id for s in corpus.split("test"))
    expected = Counter(
        item for user, items in per_user.items() for item in items[: len(items) - in_test[user]]
    )
    assert train_popularity(corpus) == expected


def test_titles_lists_and_genres_are_cleaned():
    assert clean_title(" Caf&eacute;&nbsp;&amp;amp;\t&quot;Bar&quot; ") == 'Café & "Bar"'
    assert parse_list("[1, 2]") == [1, 2] and parse_list("('a', 'b')") == ["a", "b"]
    assert (
        parse_genres("Action|Drama") == ("Action", "Drama")
        and parse_genres("['A, b', 'C']") == ("A, b", "C")
        and parse_genres(None) == ()
    )
    assert parse_genres([["Books", "History"]]) == ("Books", "History")


def test_an_array_without_commas_is_no_list_of_one_text():
    for text in ("['B1' 'B2' 'B3']", "['B1'\n 'B2']", "['a', 'b'\"c\"]", "['a' u'b']"):
        with pytest.raises(ValueError, match="no comma between its texts"):
            parse_list(text)
    assert parse_list("""['', "don't 'x' 'y'", 'a\\'' , 1]""") == ["", "don't 'x' 'y'", "a'", 1]


def test_columns_of_json_are_the_keys_of_all_its_rows(tmp_path):
    items = [
        {"item_id": "1", "title": "One"},
        {"item_id": "2", "title": "Two", "brand": "P", "genres": "x|y"},
        {"item_id": "3", "title": "Three", "brand": "Q"},
    ]
    timed = (("3", 50), ("2", 40), ("1", 30), ("2", 20), ("3", 10))
    events = [{"user_id": "a", "item_id": "1"}]
    events += [{"user_id": "a", "item_id": item, "timestamp": time} for item, time in timed]
    for name, rows in (("items", items), ("interactions", events)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match="interactions.jsonl, line 1, field `timestamp`"):
        load_corpus(section(tmp_path, split="leave_one_out"))  # it says so instead of dropping all times
    corpus = load_corpus(section(tmp_path, split="leave_one_out", on_bad_row="skip"))
    assert targets(corpus.split("test")) == [("a", ("3", "2", "1", "2"), "3")]
    assert (corpus.items["2"].provider, corpus.items["3"].provider) == ("P", "Q")
    assert corpus.items["2"].genres == ("x", "y")


def test_split_shares_are_checked():
    assert time_cuts(10, (0.8, 0.1, 0.1)) == (8, 9) and time_cuts(10, (8, 1, 1)) == (8, 9)
    with pytest.raises(UserError, match="data.split_ratio"):
        time_cuts(10, (0.0, 0.5, 0.5))
