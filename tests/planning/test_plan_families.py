"""`--plan` says for every family of models how its rows are laid out and how its catalogue is scored."""

from __future__ import annotations

import pytest

from gdrt_ds.config import load_config
from gdrt_ds.errors import UserError
from gdrt_ds.files import REPOSITORY
from gdrt_ds.planning.plan import print_plan
from tests.models.family_models import make_family


def plan_of(path, folder, *settings):
    config = load_config(
        REPOSITORY / "configs" / "smoke.yaml", [f"model.path={path}", f"run.dir={folder / 'run'}", *settings]
    )
    print_plan(config, 2, full=True)


def test_the_plan_says_that_convolutions_are_not_packed_and_are_scored_item_by_item(tmp_path, capsys):
    plan_of(make_family("lfm2", tmp_path), tmp_path, "prompt.max_length=600")
    text = capsys.readouterr().out
    assert "packing: none (auto: the model has Conv1d, Lfm2ShortConv" in text
    assert "evaluation: item by item" in text


def test_the_plan_of_an_attention_model_packs_and_scores_a_tree(tmp_path, capsys):
    plan_of(make_family("qwen3", tmp_path), tmp_path, "prompt.max_length=600")
    text = capsys.readouterr().out
    assert "packing: shared_prefix" in text and "evaluation: the catalogue is scored as a tree" in text


def test_the_plan_refuses_packed_rows_that_leak(tmp_path):
    with pytest.raises(UserError, match="train.packing = packed would let the samples"):
        plan_of(make_family("lfm2", tmp_path), tmp_path, "prompt.max_length=600", "train.packing=packed")
