"""Several data sets in one run: weights, names, users and the evaluation of each."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from eval.rows.pipeline import evaluate_rows
from eval.rows.subject import load_rows
from gdrt_ds.config import load_config
from gdrt_ds.data.supervised import SupervisedSource
from gdrt_ds.errors import UserError
from gdrt_ds.runtime import Runtime
from tests.data.sft_files import write_lines, write_splits
from tests.eval.run_folders import make_run


def mixed(folder, weights: str, *others: str):
    write_splits(folder / "first", (40, 6, 10))
    write_splits(folder / "second", (20, 4, 12))
    given = f"data.mixture={{{folder}/first: {weights.split()[0]}, {folder}/second: {weights.split()[1]}}}"
    return [given, "data.format=sft", *others]


def read(settings):
    return SupervisedSource.read(load_config(None, settings)).rows


def sizes(rows):
    return dict(Counter(row.labels["dataset"] for row in rows))


def test_weights_are_about_train_and_every_row_says_where_it_comes_from(tmp_path):
    found = read(mixed(tmp_path, "0.5 2.25"))
    assert sizes(found.splits["train"]) == {"first": 20, "second": 45}
    assert sizes(found.splits["valid"]) == {"first": 6, "second": 4}
    assert sizes(found.splits["test"]) == {"first": 10, "second": 12}
    for rows in found.splits.values():
        assert [row.sample_id for row in rows] == list(range(len(rows)))
    second = Counter(row.prompt for row in found.splits["train"] if row.labels["dataset"] == "second")
    assert sorted(second.values()) == [2] * 15 + [3] * 5
    assert "second: 45 rows of train, 20 at weight 2.25" in found.notes


def test_rows_that_two_data_sets_share_are_counted_where_one_trains_on_them(tmp_path):
    for name in ("first", "second"):
        for split, size in (("train", 20), ("valid", 2), ("test", 4)):
            values = [{"prompt": f"{name} {split} {i}", "completion": "yes"} for i in range(size)]
            write_lines(tmp_path / name / f"{split}.jsonl", values)
    given = f"data.mixture={{{tmp_path}/first: 1, {tmp_path}/second: 1}}"
    settings = [given, "data.format=sft", "groups.by=position"]
    assert not any("also rows of train" in note for note in read(settings).notes)
    with open(tmp_path / "first" / "train.jsonl", "a", encoding="utf-8") as stream:
        stream.write((tmp_path / "second" / "test.jsonl").read_text())
    assert any("test: 4 of 8 rows are also rows of train" in note for note in read(settings).notes)


def test_the_drawn_rows_are_the_same_every_time_and_others_with_another_seed(tmp_path):
    settings = mixed(tmp_path, "0.5 1")
    assert read(settings).splits == read(settings).splits
    other = read([*settings, "data.sample_seed=1"])
    assert sizes(other.splits["train"]) == {"first": 20, "second": 20}
    assert other.splits["train"] != read(settings).splits["train"]


def test_weights_that_leave_no_row_of_train_are_refused_with_their_numbers(tmp_path):
    with pytest.raises(UserError) as caught:
        read(mixed(tmp_path, "0.01 0.02"))
    told = caught.value.problem
    assert "data.mixture leaves no row of train" in told
    assert f"{tmp_path}/first: weight 0.01 of 40 rows" in told
    assert f"{tmp_path}/second: weight 0.02 of 20 rows" in told
    assert "raise the weights" in caught.value.fix
    assert len(read(mixed(tmp_path, "0.01 0.04")).splits["train"]) == 1


def test_users_of_two_data_sets_are_two(tmp_path):
    """Rows without a user are numbered in each data set anew."""
    users = {row.user_id for row in read(mixed(tmp_path, "1 1")).splits["train"]}
    assert len(users) == 60


def test_equal_names_and_other_formats_are_refused(tmp_path):
    write_splits(tmp_path / "a" / "rows")
    write_splits(tmp_path / "b" / "rows")
    given = f"data.mixture={{{tmp_path}/a/rows: 1, {tmp_path}/b/rows: 1}}"
    with pytest.raises(UserError, match="have the same name, rows"):
        read([given, "data.format=sft"])
    with pytest.raises(UserError, match="data.format=sft"):
        load_config(None, [given])


def test_each_data_set_is_evaluated_apart(tmp_path):
    run = make_run(tmp_path / "run", mixed(tmp_path, "1 1", "model.dtype=float32"))
    evaluate_rows(load_rows(Runtime(), run=str(run)), Runtime(), num_bootstrap=50)
    results = json.loads((run / "eval" / "test-full" / "results.json").read_text(encoding="utf-8"))
    apart = results["breakdowns"]["label:dataset"]["groups"]
    assert {name: figures["nll"]["n"] for name, figures in apart.items()} == {"first": 10, "second": 12}
    assert results["metrics"]["nll"]["n"] == 22
