"""The catalogue beside an exported model: the trie of the evaluation, in the file that the docs describe."""

from __future__ import annotations

import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from gdrt_ds.data.trie_file import ARRAYS, TRIE_FILE, load_limits, load_trie, save_trie
from gdrt_ds.errors import UserError
from gdrt_ds.files import REPOSITORY
from gdrt_ds.inference.catalogue_files import ExportedPrompts
from gdrt_ds.inference.exporting import export
from gdrt_ds.inference.recommender import open_run, read_run_config
from gdrt_ds.runtime import Runtime
from tests.eval.run_folders import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("catalogue") / "run")


@pytest.fixture(scope="module")
def exported(run):
    done = export(run, run.parent / "model")
    assert done["catalogue"].startswith("catalogue of 24 titles, its trie has ")
    return run.parent / "model"


def test_the_export_holds_the_trie_titles_and_prompt_of_the_evaluation(run, exported):
    expected = open_run(run, Runtime()).trie
    found = load_trie(exported)
    for name in ARRAYS:
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    for name in ("catalogue.jsonl", "prompt.json"):
        assert (exported / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("given", ["objective=sft", "train.seed=7", "prompt.template=plain", "dro.tau=9"])
def test_settings_that_the_training_used_up_cannot_be_others_afterwards(run, given):
    """They would change nothing but what the records say."""
    key = given.partition("=")[0]
    with pytest.raises(UserError, match=f"{key.partition('.')[0]}.* is another than in the training"):
        read_run_config(run, [given])
    same = [f"objective={read_run_config(run).objective}", "data.limit_test=5", "model.dtype=float32"]
    assert read_run_config(run, same).data.limit_test == 5


def test_the_docs_name_the_arrays_of_the_trie(exported):
    page = (REPOSITORY / "docs" / "file-formats.md").read_text(encoding="utf-8")
    section = page.split("\n### catalogue_trie.safetensors\n")[1].split("\n#")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(load_file(exported / TRIE_FILE))


def test_a_run_without_a_catalogue_is_exported_without_one_and_it_is_said(run, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("adapter", "base", "config.yaml", "prompt.json"):
        (tmp_path / "run" / name).symlink_to(run / name)
    done = export(tmp_path / "run", tmp_path / "out")
    assert done["catalogue"] == "no catalogue: the run has no catalogue.jsonl"
    with pytest.raises(UserError, match="does not exist"):
        load_trie(tmp_path / "out")


def test_the_export_says_how_long_prompts_are_and_asks_as_the_run_does(run, exported, tmp_path):
    recommender = open_run(run, Runtime())
    assert load_limits(exported) == (recommender.encoder.max_length, 10)
    prompts = ExportedPrompts(exported, AutoTokenizer.from_pretrained(exported))
    titles = [entry.text for entry in recommender.catalogue.entries]
    for history in (titles[:1], titles[:4], titles[:13], ["A film nobody knows", *titles[5:8]]):
        assert prompts.ids(history) == recommender.prompt_of_titles(history)
    save_trie(load_trie(exported), tmp_path / TRIE_FILE)  # as earlier versions did
    assert load_trie(tmp_path).num_nodes == recommender.trie.num_nodes
    with pytest.raises(UserError, match="does not say how long prompts are"):
        load_limits(tmp_path)


def test_files_that_are_no_trie_are_refused(exported, tmp_path):
    arrays = load_file(exported / TRIE_FILE)
    path = tmp_path / TRIE_FILE
    save_file({**arrays, "parent": np.roll(arrays["parent"], 1)}, path, {"format": "1"})
    with pytest.raises(UserError, match="no tree"):
        load_trie(path)
    save_file({**arrays, "depth": arrays["depth"][:-1]}, path, {"format": "1"})
    with pytest.raises(UserError, match="no tree"):
        load_trie(path)
    save_file(arrays, path, {"format": "2"})
    with pytest.raises(UserError, match="in format 2, and a trie of format 1 holds token"):
        load_trie(tmp_path)
    path.write_bytes(b"x" * 40)
    with pytest.raises(UserError, match="cannot be read"):
        load_trie(path)
