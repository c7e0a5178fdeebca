"""A refused setting is told with who gave it, what it takes, and an example that is itself accepted."""

from __future__ import annotations

import pytest
import yaml

from gdrt_ds.config import load_config
from gdrt_ds.config.explaining import NAMES_ELSEWHERE, example_of, fields_of, is_section, nearest_key
from gdrt_ds.errors import UserError


def refusal(overrides: list[str], path=None) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return caught.value


def test_a_value_of_the_command_line_is_not_blamed_on_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {lr: 0.1}\ndro: {tau: -1}\n")
    problem = refusal(["train.lr=0", "seed=3"], path).problem
    assert "command line: train.lr = 0" in problem
    assert "command line: unknown key `seed`" in problem
    assert f"{path}: dro.tau = -1" in problem
    combination = refusal(["groups.by=column"])
    assert combination.problem.startswith("command line: groups.by=column needs")


@pytest.mark.parametrize(
    "override, allowed, example",
    [
        ("train.lr=0", "above 0", "train.lr=0.0001"),
        ("train.betas=[1.5, 0.9]", "below 1", "train.betas=[0.9, 0.999]"),
        ("train.max_steps=0", "at least 1", "train.max_steps=1000"),
        ("train.micro_batch=0", "whole number at least 1, or `auto`", "train.micro_batch=auto"),
        ("dro.estimate=late", "`batch`, `ema`", "dro.estimate=batch"),
        ("train.epochs=many", "number", "train.epochs=1.0"),
        ("model.quantization=int8", "`nf4`", "model.quantization=nf4"),
    ],
)
def test_the_fix_names_the_allowed_range_and_an_example(override, allowed, example):
    fix = refusal([override]).fix
    assert override.partition("=")[0] in fix and allowed in fix and f"e.g. {example}" in fix


def test_every_example_is_accepted_by_the_key_that_it_is_for():
    examples = {key: example_of(key, field) for key, field in fields_of().items() if not is_section(field)}
    given = [example for example in examples.values() if example]
    assert len(given) > 70
    for example in given:
        load_config(None, [example])


@pytest.mark.parametrize(
    "key, meant",
    [
        ("seed", "train.seed"),
        ("lr", "train.lr"),
        ("optimizer.lr", "train.lr"),
        ("train.tau", "dro.tau"),
        ("path", "data.path"),
        ("model.pathh", "model.path"),
        ("zzzz", None),
    ],
)
def test_a_key_that_ends_as_a_known_one_means_that_one(key, meant):
    assert nearest_key(key) == meant
    told = refusal([f"{key}=3"]).problem
    assert f"unknown key `{key}`" in told
    assert ("did you mean" in told) == (meant is not None)


def test_names_of_other_trainers_are_understood_and_each_means_a_key_that_there_is():
    assert set(NAMES_ELSEWHERE.values()) <= set(fields_of())
    assert not set(NAMES_ELSEWHERE) & {key.rpartition(".")[2] for key in fields_of()}
    assert nearest_key("train.learning_rate") == "train.lr"
    assert nearest_key("per_device_train_batch_size") == "train.micro_batch"


def test_the_fix_of_an_unknown_key_lists_what_stands_beside_it():
    assert refusal(["dro.zzzz=1"]).fix.startswith("dro has tau, estimate")
    assert refusal(["model.lora.zzzz=1"]).fix.startswith("model.lora has r, alpha")
    assert refusal(["zzzz=1"]).fix.startswith("the first level has run, data")


@pytest.mark.parametrize("weights", ["[-3, 1, 1, 2]", "[.nan, 1]", "[.inf, 1]", "[0, 0]"])
def test_frozen_weights_are_refused_unless_they_are_a_distribution(weights):
    told = refusal([f"dro.frozen_weights={weights}"])
    assert told.problem.startswith("command line: dro.frozen_weights = [")
    assert "valid string" not in told.problem


def test_a_frozen_weight_of_zero_leaves_its_group_out():
    assert load_config(None, ["dro.frozen_weights=[0, 1, 3]"]).dro.frozen_weights == [0, 1, 3]


@pytest.mark.parametrize(
    "shares, word",
    [("[0.8, 0.1, 0.2]", "sum to 1.1"), ("[1.2, -0.1, -0.1]", "0"), ("[0, 0.5, 0.5]", "nothing to train on")],
)
def test_shares_of_the_splits_make_one_whole_whatever_the_data(shares, word):
    told = refusal([f"data.split_ratio={shares}", "data.path=planted", "data.split=leave_one_out"])
    assert "data.split_ratio" in told.problem and word in told.problem


@pytest.mark.parametrize(
    "overrides, word",
    [
        (["train.lr=0.1", "train.weight_decay=10"], "take away the whole weight"),
        (["data.min_history=11"], "no window could be made"),
        (["groups.by=random", "groups.reference=auxiliary_sft"], "groups.reference_adapter"),
    ],
)
def test_settings_that_cannot_be_meant_together_are_refused(overrides, word):
    assert word in refusal(overrides).problem


@pytest.mark.parametrize("word", ["true", "off"])
def test_a_truth_value_is_no_number(word):
    assert "no numbers" in refusal([f"train.max_steps={word}"]).problem
    assert yaml.safe_load(word) in (True, False)


def test_text_of_digits_stays_text_on_the_command_line():
    assert load_config(None, ["model.revision=1234567"]).model.revision == "1234567"
    assert load_config(None, ["model.revision=12e4567"]).model.revision == "12e4567"
    assert load_config(None, ["train.lr=1e-3"]).train.lr == 1e-3


def test_a_section_whose_keys_are_all_commented_out_is_an_empty_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dro:\n  # tau: 0.3\ntrain:\n  seed: 3\n")
    assert load_config(path).dro.tau == 1.0
    assert load_config(path, ["dro.tau=2"]).dro.tau == 2.0


def test_a_folder_under_home_is_found_in_a_file_and_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "run.yaml"
    path.write_text("run:\n  dir: ~/runs/x\n")
    assert load_config(path).run.dir == str(tmp_path / "runs" / "x")
    given = load_config(None, ["run.dir=~/runs/x", "resume=~/runs/y/checkpoints/step_1"])
    assert given.run.dir == str(tmp_path / "runs" / "x")
    assert given.resume == str(tmp_path / "runs" / "y" / "checkpoints" / "step_1")


@pytest.mark.parametrize(
    "override, value",
    [
        ("groups.column=topic #2", "topic #2"),
        ("data.path=my data #1", "my data #1"),
        ("data.revision=2024-05-01", "2024-05-01"),
        ("run.dir=2024-13-45", "2024-13-45"),
        (r"model.new_tokens=[a-z]_\d", r"[a-z]_\d"),
        ("run.dir=on", "on"),
        ("run.dir='a b'", "a b"),
        ("groups.column=null", None),
        ("groups.column=", None),
    ],
)
def test_text_of_the_command_line_is_taken_as_it_stands(override, value):
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(load_config(None, [override]), section), key) == value


def test_what_looks_like_a_date_in_a_file_is_text_and_sections_in_sections_may_be_empty(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("data:\n  revision: 2024-05-01\nmodel:\n  lora:\n    # r: 4\n")
    config = load_config(file)
    assert config.data.revision == "2024-05-01" and config.model.lora.r == load_config(None).model.lora.r


def test_folders_of_a_mixture_may_be_under_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = load_config(None, ["data.mixture={~/a: 1, b: 2}", "data.format=sft"]).data.mixture
    assert found == {str(tmp_path / "a"): 1, "b": 2}
