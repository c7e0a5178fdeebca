"""`train.packing=auto` looks at the tokens: several completions of one prompt are computed as a tree."""

from __future__ import annotations

import json

import pytest

from gdrt_ds.config import load_config
from gdrt_ds.planning.plan import plan_run
from gdrt_ds.training.preparation import TREE_PAYS, plan_batches, prepare

COMPLETIONS = 4


def plan_of(tmp_path, completions: int, *more: str):
    """A plan for rows whose prompts have `completions` answers each, one behind the other."""
    rows = tmp_path / "rows.jsonl"
    lines = []
    for number in range(96):
        prompt = f"Report {number // completions} of the week, with words of its own: {'so ' * 12}?"
        lines.append(json.dumps({"prompt": prompt, "completion": f" answer {number % completions}"}) + "\n")
    rows.write_text("".join(lines), encoding="utf-8")
    settings = [
        f"data.path={rows}",
        "data.format=sft",
        "model.path=tiny-random",
        "model.quantization=none",
        "train.global_batch=48",
        "train.micro_batch=48",
        "train.max_steps=2",
        f"run.dir={tmp_path / 'run'}",
        *more,
    ]
    config = load_config(None, settings)
    return plan_run(config, prepare(config), 1)


def test_completions_of_one_prompt_become_a_tree(tmp_path):
    plan = plan_of(tmp_path, COMPLETIONS)
    packing, line = plan.packing
    assert packing == "prefix_tree"
    assert plan.tokens["prefix_tree"] <= TREE_PAYS * plan.tokens["shared_prefix"]
    assert f"{plan.tokens['prefix_tree']:,.0f} tokens a step" in line and "samples begin alike" in line


def test_prompts_of_their_own_share_the_fixed_words_only(tmp_path):
    plan = plan_of(tmp_path, 1)
    assert plan.tokens["prefix_tree"] > TREE_PAYS * plan.tokens["shared_prefix"]
    assert plan.packing[0] == "shared_prefix"


@pytest.mark.parametrize("wish", ["none", "packed", "shared_prefix"])
def test_a_wish_is_kept_whatever_it_costs(tmp_path, wish):
    assert plan_of(tmp_path, COMPLETIONS, f"train.packing={wish}").packing[0] == wish


def test_a_plan_for_another_packing_keeps_the_micro_batch_that_the_engine_was_told(tmp_path):
    """Where rows turn out to leak, they are padded, and DeepSpeed's settings are fixed by then."""
    plan = plan_of(tmp_path, COMPLETIONS, "train.micro_batch=auto")
    store, config = plan.prepared.stores["train"], plan.config
    assert plan_batches(config, store, 1, "none").micro_batch == 8
    assert plan_batches(config, store, 1, "none", 24).micro_batch == 24
