"""gdrt-init writes a config that the readers take, and says what it could not find."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from gdrt_ds.commands import init
from gdrt_ds.config import load_config
from gdrt_ds.data.corpus import load_corpus
from gdrt_ds.data.looking import look_at
from gdrt_ds.data.readers.movielens import READER as MOVIELENS
from gdrt_ds.data.sources import read_source
from gdrt_ds.errors import UserError
from gdrt_ds.objectives import get_objective
from gdrt_ds.planning.starter import starter_config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_table(path, header, rows):
    path.write_text("\n".join([header, *rows]) + "\n")


def events(users=4, items=6):
    return [f"{u},Title {i},{i},4,{100 * u + i}" for u in range(users) for i in range(items)]


def test_a_table_with_titles_of_its_own_becomes_a_config_that_reads_it(folder):
    write_table(folder / "log.csv", "userId,title,asin,stars,date", events())
    assert init.main(["log.csv"]) == 0
    text = (folder / "gdrt.yaml").read_text()
    config = load_config("gdrt.yaml")
    assert config.data.columns == {
        "user": "userId", "item": "asin", "timestamp": "date", "rating": "stars", "title": "title",
    }  # fmt: skip
    assert len(load_corpus(config.data).items) == 6
    assert config.dro.tau == 3.0, "a catalogue's groups differ by nats that cannot be learned"
    keys = [line for line in text.splitlines() if ":" in line and not line.rstrip().endswith(":")]
    assert all("#" in line for line in keys), "every key has a comment"


def test_a_table_without_times_is_split_by_the_last_item(folder):
    write_table(folder / "interactions.csv", "user,item", [f"{u},{i}" for u in range(4) for i in range(6)])
    write_table(folder / "items.csv", "id,name", [f"{i},Title {i}" for i in range(6)])
    assert init.main([".", "--output", "own.yaml"]) == 0
    config = load_config("own.yaml")
    assert config.data.split == "leave_one_out" and config.data.items is None
    assert len(load_corpus(config.data).splits["test"]) == 4


def test_a_column_that_nobody_knows_has_to_be_filled_in(folder, capsys):
    write_table(folder / "log.csv", "customer,title,asin,stars,date", events())
    assert init.main(["log.csv"]) == 0
    assert "fill in data.columns.user" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data.columns.user=\?\?\?.*customer"):
        load_corpus(load_config("gdrt.yaml").data)
    config = load_config("gdrt.yaml", ["data.columns.user=customer"])
    assert len({sample.user_id for sample in load_corpus(config.data).splits["train"]}) > 1


def test_times_under_an_unknown_name_are_asked_for_and_not_passed_over(folder, capsys):
    write_table(folder / "log.csv", "user,title,item,stars,clock", events())
    assert init.main(["log.csv"]) == 0
    assert "if one of clock holds times, set data.columns.timestamp" in capsys.readouterr().out
    config = load_config("gdrt.yaml", ["data.columns.timestamp=clock", "data.split=time"])
    assert load_corpus(config.data).splits["train"][0].timestamp is not None
    write_table(folder / "known.csv", "user,title,item,stars,date", events())
    assert init.main(["known.csv", "--output", "known.yaml"]) == 0
    assert "holds times" not in capsys.readouterr().out


def test_the_config_for_the_tiny_model_lets_it_learn(folder):
    assert init.main(["planted", "--model", "tiny-random", "--output", "tiny.yaml"]) == 0
    config = load_config("tiny.yaml")
    assert config.model.quantization == "none" and config.model.train_head
    assert config.model.lora.targets == "all-linear" and config.groups.reference == "corpus"
    assert init.main(["planted"]) == 0
    other = load_config("gdrt.yaml")
    assert other.model.quantization == "nf4" and other.train.lr < config.train.lr / 10


def test_every_objective_that_the_config_names_can_be_chosen(folder):
    assert init.main(["planted"]) == 0
    line = next(
        row for row in (folder / "gdrt.yaml").read_text().splitlines() if row.startswith("objective:")
    )
    named = line.split("one of ")[1].split(", ")
    assert len(named) > 8
    for name in named:
        assert get_objective(name).name == name


def test_windows_are_recognised_as_a_training_recognises_them(folder):
    (folder / "train.csv").write_text("user_id,item_ids,timestamp\n")
    seen = look_at(".")
    assert (seen.format, seen.columns) == ("windows", {})
    assert MOVIELENS.embedded[0] == "ml-100k" and look_at("ml-100k").format == "movielens"


def test_nothing_that_exists_is_overwritten(folder):
    (folder / "gdrt.yaml").write_text("mine: 1\n")
    with pytest.raises(SystemExit) as ended:
        init.main(["planted"])
    assert ended.value.code == 2
    assert yaml.safe_load((folder / "gdrt.yaml").read_text()) == {"mine": 1}
    (folder / "slurm").mkdir()
    with pytest.raises(SystemExit):
        init.main(["--slurm"])


def test_data_without_titles_are_refused_with_what_is_missing(folder):
    write_table(folder / "log.csv", "user,item", ["1,2"])
    with pytest.raises(UserError, match="no column of titles"):
        look_at("log.csv")


ROWS = {
    "relevance": {"auxiliary_prompt": "Team: "},
    "label": {"group": "urgent"},
    "position": {"channel": "mail"},
}


@pytest.mark.parametrize("by", ROWS)
def test_rows_of_prompt_and_completion_get_the_groups_that_their_columns_allow(folder, capsys, by):
    rows = [{"prompt": f"Ticket {i}. Team: ", "completion": f"team {i % 3}", **ROWS[by]} for i in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    assert init.main(["rows.jsonl", "--model", "tiny-random"]) == 0
    assert "recognised as `sft`" in capsys.readouterr().out
    config = load_config("gdrt.yaml")
    assert config.data.format == "sft" and config.groups.by == by
    keys = [line for line in (folder / "gdrt.yaml").read_text().splitlines() if ":" in line]
    assert all("#" in line for line in keys if not line.rstrip().endswith(":")), "every key has a comment"
    source = read_source(config)
    assert sum(map(len, source.rows.splits.values())) == 20
    if by == "relevance":
        assert all(row.auxiliary for row in source.rows.splits["train"])


def test_the_parent_folder_and_the_readers_own_word_for_items(folder, monkeypatch):
    write_table(folder / "log.csv", "user,title,item,rating,timestamp", events())
    look = look_at("log.csv")
    assert look.domain == "item" and look_at("ml-100k").domain is None
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    text = starter_config(look_at("../log.csv"), "gdrt.yaml", "tiny-random")
    assert yaml.safe_load(text)["run"]["dir"] == "runs/log"
    assert yaml.safe_load(starter_config(replace(look, path=".."), "x.yaml", "m"))["run"]["dir"] == (
        f"runs/{folder.name}"
    )
    text = starter_config(replace(look, domain=None), "x.yaml", "m")
    assert "domain" not in yaml.safe_load(text)["prompt"]
