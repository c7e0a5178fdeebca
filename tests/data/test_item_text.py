"""Items that are not titles: a column of the user's choice, and semantic ids as new tokens."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.folders import open_evaluation
from eval.run import main as evaluate
from gdrt_ds.config import DataSection, RunConfig
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import load_corpus
from gdrt_ds.errors import UserError
from gdrt_ds.models.built_in import make_tiny_model
from gdrt_ds.models.new_tokens import find_tokens, with_new_tokens
from gdrt_ds.planning.compatibility import refusals
from gdrt_ds.recommend import main as recommend
from gdrt_ds.training.run_folder import versions
from tests.distributed.launch import SMOKE, play
from tests.distributed.ranks import preload
from tests.models.family_models import make_family

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NEW = ["<a_0>", "<a_1>", "<b_0>"]


def write_log(folder: Path) -> Path:
    """Users of two tastes over 16 films."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    films = [f"Film {number}" for number in range(16)]
    with open(folder / "items.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["item_id", "title"], *enumerate(films)])
    rows = [["user_id", "item_id", "timestamp"]]
    for user in range(24):
        liked = [film for film in range(16) if film % 2 == user % 2]
        rows += [[user, film, place] for place, film in enumerate(draw.sample(liked, 8))]
    with open(folder / "interactions.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return folder


def call(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("semantic")
    log = write_log(folder / "log")
    call("docs/examples/items/semantic_ids.py", str(log), str(folder / "data"), "--codes", "2")
    return folder / "data"


@pytest.fixture(scope="module")
def trained(data) -> tuple[Path, str]:
    """A run on semantic ids with two ranks of ZeRO-3 and NF4, and what its training said."""
    run = data.parent / "run"
    preload()
    done = play(
        2,
        [
            "--config",
            SMOKE,
            f"run.dir={run}",
            f"data.path={data}",
            "data.item_text=semantic_id",
            "model.new_tokens=<[a-c]_[0-9]+>",
            "model.lora.trainable_tokens=added",
            "train.max_steps=4",
        ],
        data.parent / "logs",
    )
    assert done.statuses == [0, 0], done.text
    return run, done.outputs[0]


# -- the text of an item
def test_a_column_of_the_item_table_is_the_text_and_the_title_stays_the_name(data):
    corpus = load_corpus(DataSection(path=str(data), item_text="semantic_id"))
    titles = load_corpus(DataSection(path=str(data)))
    assert all(item.title.startswith("<a_") for item in corpus.items.values())
    assert [item.name for item in corpus.items.values()] == [item.title for item in titles.items.values()]
    assert {item.name for item in titles.items.values()} == {None}
    assert corpus.fingerprint != titles.fingerprint


def test_items_with_one_semantic_id_are_one_entry_and_counted(data):
    corpus = load_corpus(DataSection(path=str(data), item_text="semantic_id"))
    catalogue = Catalogue.build(corpus)
    texts = [item.title for item in corpus.items.values()]
    most = max(texts.count(text) for text in texts)
    assert len(catalogue) == len(set(texts)) < len(texts)
    (note,) = catalogue.notes()
    assert note.startswith(f"{16 - len(catalogue)} of 16 items share their text with another and are merged")
    assert f"at most {most} items in one" in note
    for entry in catalogue.entries:
        assert entry.name == " / ".join(corpus.items[item].name for item in entry.merged_ids)


def test_a_column_that_is_not_there_and_a_format_without_columns_are_refused(data):
    with pytest.raises(UserError, match=r"data.item_text=semantic_idd: items.csv has no such column") as told:
        load_corpus(DataSection(path=str(data), item_text="semantic_idd"))
    assert "semantic_id" in told.value.fix
    with pytest.raises(UserError, match="has no item table"):
        load_corpus(DataSection(path="planted", item_text="semantic_id"))


# -- new tokens of a model
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_base_with_new_tokens_has_the_old_rows_and_drawn_ones(tmp_path, family):
    source = make_family(family, tmp_path)
    before = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    old = len(tokenizer)
    folder = with_new_tokens(source, tokenizer, NEW, tmp_path / "base", seed=3)
    after = AutoModelForCausalLM.from_pretrained(folder)
    extended = AutoTokenizer.from_pretrained(folder)
    ids = extended.convert_tokens_to_ids(NEW)
    assert extended.tokenize("<a_1><b_0>") == ["<a_1>", "<b_0>"] and min(ids) >= old
    assert after.config.get_text_config().vocab_size >= len(extended)
    for read in (type(before).get_input_embeddings, type(before).get_output_embeddings):
        rows, kept = read(after).weight, read(before).weight
        untouched = [row for row in range(len(kept)) if row not in ids]
        assert torch.equal(rows[untouched], kept[untouched])
        assert len({tuple(row.tolist()) for row in rows[ids]}) == len(NEW)
        assert rows[ids].isfinite().all() and rows[ids].abs().max() < 10 * kept.abs().max()
    text = torch.tensor([[4, 5, 6, 7]])
    torch.testing.assert_close(after(text).logits[..., :old], before(text).logits[..., :old])


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_rows_grow_under_whichever_name_they_are_kept(tmp_path, kept):
    source = make_tiny_model(tmp_path / "tied", ["one two three"], 0, tie_embeddings=True)
    file = source / "model.safetensors"  # `smollm2-135m` keeps the name of the head, like this one
    weights = {kept if value.shape[0] > 200 else name: value for name, value in load_file(file).items()}
    assert kept in weights
    save_file(weights, file, {"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(source)
    folder = with_new_tokens(source, tokenizer, NEW, tmp_path / "base", seed=3)
    before, after = (AutoModelForCausalLM.from_pretrained(place) for place in (source, folder))
    rows, old = after.get_input_embeddings().weight, before.get_input_embeddings().weight
    assert torch.equal(rows[: len(old)], old) and len(rows) == len(old) + len(NEW)
    assert after.get_output_embeddings().weight is rows
    assert len({tuple(row.tolist()) for row in rows[-len(NEW) :]}) == len(NEW)


def test_a_base_is_made_once_and_never_overwritten_by_other_tokens(tmp_path):
    source = make_family("llama", tmp_path)
    folder = with_new_tokens(source, AutoTokenizer.from_pretrained(source), NEW, tmp_path / "base", 0)
    first = (folder / "model.safetensors").stat().st_mtime_ns
    with_new_tokens(source, AutoTokenizer.from_pretrained(source), NEW, tmp_path / "base", 0)
    assert (folder / "model.safetensors").stat().st_mtime_ns == first
    with pytest.raises(UserError, match="other tokens"):
        with_new_tokens(source, AutoTokenizer.from_pretrained(source), NEW[:2], tmp_path / "base", 0)


def test_patterns_that_match_nothing_or_are_none_are_refused():
    assert find_tokens("<[a-z]_[0-9]+>", ["<b_2><a_10>", "<a_10> x"]) == ["<a_10>", "<b_2>"]
    for pattern, words in (
        ("<z>", "matches nothing"),
        ("(", "no regular expression|not a regular"),
        ("x*", "empty text"),
    ):
        with pytest.raises(UserError, match=words):
            find_tokens(pattern, ["<a_1>"])


def test_new_tokens_whose_rows_nothing_trains_are_refused():
    config = RunConfig.model_validate({"model": {"path": "tiny-random", "new_tokens": "<a>"}})
    told = refusals(config, {"zero_optimization": {"stage": 1}}, False, versions())
    found = [problem for problem, _ in told]
    assert any("nothing trains the rows of the new tokens" in problem for problem in found)


# -- from training to recommendations
def test_training_says_what_it_added_and_trains_the_rows(trained):
    run, said = trained
    assert "tokens of model.new_tokens, e.g. <a_0>, <a_1>" in said
    assert "share their text with another" in said
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    rows = next(
        value for name, value in weights.items() if "token_adapter" in name or "trainable_tokens" in name
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    ids = tokenizer.convert_tokens_to_ids(find_tokens("<[a-c]_[0-9]+>", map(str, tokenizer.get_vocab())))
    base = AutoModelForCausalLM.from_pretrained(run / "base").get_input_embeddings().weight
    assert rows.shape == base[sorted(ids)].shape and not torch.equal(rows, base[sorted(ids)])


def test_a_run_on_semantic_ids_is_evaluated_and_recommends_with_names(trained, capsys):
    run, _ = trained
    evaluate(["--run", str(run), "--bootstrap", "20", "--floors", "popularity"])
    results = json.loads((run / "eval" / "test-renormalised" / "results.json").read_text(encoding="utf-8"))
    assert results["metrics"]["nll"]["value"] > 0
    entries = [
        json.loads(line) for line in (run / "catalogue.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    measured = open_evaluation(run / "eval" / "test-renormalised").entries()
    assert [entry.name for entry in measured] == [entry["name"] for entry in entries]
    capsys.readouterr()
    recommend(["--run", str(run), "--history", entries[0]["name"], "--k", "3", "--json"])
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found["history"] == [entries[0]["text"]] and found["unknown"] == []
    names = {entry["text"]: entry["name"] for entry in entries}
    assert len(found["recommendations"]) == 3
    assert all(row["name"] == names[row["title"]] for row in found["recommendations"])
