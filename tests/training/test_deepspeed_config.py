"""DeepSpeed JSON: every "auto" is filled, and every contradiction with the run config is told with both
numbers.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from gdrt_ds.batches import BatchPlan
from gdrt_ds.config import load_config
from gdrt_ds.errors import UserError
from gdrt_ds.files import REPOSITORY
from gdrt_ds.training.deepspeed_config import (
    fill_deepspeed_config,
    lone_rank_line,
    read_deepspeed_config,
    zero3_limits,
    zero_stage,
)

RUN = load_config(None, ["train.global_batch=24", "train.micro_batch=4", "train.grad_clip=0.5"])
PLAN = BatchPlan(np.full(100, 9), 24, 4, 2, 0)


def fill(raw, run=RUN, plan=PLAN, dtype=torch.float32):
    return fill_deepspeed_config(raw, run, plan, dtype, 64)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_preset_fills_completely_and_keeps_the_file_as_it_was(path, dtype):
    raw = read_deepspeed_config(str(path))
    before = json.dumps(raw)
    filled = fill(raw, dtype=dtype)
    assert '"auto"' not in json.dumps(filled) and json.dumps(raw) == before
    assert (
        filled["train_micro_batch_size_per_gpu"],
        filled["gradient_accumulation_steps"],
        filled["train_batch_size"],
    ) == (4, 3, 24)
    assert filled["gradient_clipping"] == 0.5 and filled["bf16"]["enabled"] == (dtype == torch.bfloat16)
    assert read_deepspeed_config(f"ds_configs/{path.name}") == raw and zero_stage(raw) in (0, 1, 2, 3)


def test_batch_arithmetic_holds_when_the_global_batch_does_not_divide():
    for world, micro, batch in ((3, 4, 25), (4, 8, 33), (2, 5, 7)):
        plan = BatchPlan(np.full(100, 9), batch, micro, world, 0)
        run = load_config(None, [f"train.global_batch={batch}", f"train.micro_batch={micro}"])
        filled = fill({}, run, plan)
        assert (
            filled["train_batch_size"]
            == filled["train_micro_batch_size_per_gpu"] * filled["gradient_accumulation_steps"] * world
            >= batch
        )
        assert (
            max(len(m) for slots in plan.step(0) for m in slots)
            <= filled["train_micro_batch_size_per_gpu"]
            <= micro
        )


@pytest.mark.parametrize(
    "raw,words",
    [
        ({"train_batch_size": 64}, ["train_batch_size = 64", "24"]),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps = 2", "3"]),
        ({"train_micro_batch_size_per_gpu": 8}, ["= 8", "gives 4"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping = 1.0", "0.5"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled = true", "float32"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled = true", "float32"]),
        ({"optimizer": {"type": "Lamb"}}, ["Lamb", "adamw"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, ["lr = 1.0", "0.0001"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "step"]),
        ({"zero_optimization": {"sub_group_size": "auto"}}, ["zero_optimization.sub_group_size", "auto"]),
    ],
)
def test_a_contradiction_names_both_values(raw, words):
    with pytest.raises(UserError) as caught:
        fill(raw)
    assert all(word in caught.value.problem for word in words), caught.value.problem


def test_an_auto_optimizer_is_filled_from_the_run_config():
    run = load_config(
        None,
        [
            "train.global_batch=24",
            "train.micro_batch=4",
            "train.lr=0.01",
            "train.betas=[0.8, 0.95]",
            "train.weight_decay=0.1",
        ],
    )
    entry = fill(
        {"optimizer": {"type": "auto", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}}},
        run,
    )["optimizer"]
    assert entry == {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.1}}


def test_one_rank_with_zero3_is_told_that_it_shards_nothing_unless_something_is_offloaded():
    zero3 = {"zero_optimization": {"stage": 3}}
    assert "deepspeed=ds_configs/zero1.json is faster" in lone_rank_line(zero3, 1)
    assert lone_rank_line(zero3, 2) == ""
    assert lone_rank_line({"zero_optimization": {"stage": 2}}, 1) == ""
    assert lone_rank_line({}, 1) == ""
    for key in ("offload_param", "offload_optimizer"):
        offload = {"zero_optimization": {"stage": 3, key: {"device": "cpu"}}}
        assert lone_rank_line(offload, 1) == ""
        offload["zero_optimization"][key]["device"] = "none"
        assert lone_rank_line(offload, 1) != ""


def test_files_that_are_missing_or_broken_are_told_with_the_nearest_preset(tmp_path):
    with pytest.raises(UserError, match="did you mean `ds_configs/zero3_qlora.json`"):
        read_deepspeed_config("ds_configs/zero3_qlra.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_deepspeed_config(str(tmp_path / "x.json"))
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(UserError, match="expected an object, found list"):
        read_deepspeed_config(str(tmp_path / "y.json"))


PRESETS = sorted(path.name for path in (REPOSITORY / "ds_configs").glob("*.json"))


def test_every_preset_says_for_whom_it_is():
    text = (REPOSITORY / "ds_configs" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\S+\.json)` \|", text, re.MULTILINE) != []
    assert sorted(re.findall(r"^\| `(\S+\.json)` \|", text, re.MULTILINE)) == PRESETS


def test_presets_differ():
    contents = {}
    for name in PRESETS:
        raw = json.loads((REPOSITORY / "ds_configs" / name).read_text(encoding="utf-8"))
        same = [other for other, found in contents.items() if found == raw]
        assert same == [], f"{name} is {same}"
        contents[name] = raw


@pytest.mark.parametrize("hidden, elements", [(64, 1 << 20), (1024, 1 << 20), (4096, 4096**2)])
def test_the_gradients_of_a_small_model_are_reduced_together(hidden, elements):
    raw = read_deepspeed_config("ds_configs/zero1.json")
    filled = fill_deepspeed_config(raw, RUN, PLAN, torch.float32, hidden)
    assert filled["zero_optimization"]["reduce_bucket_size"] == elements


@pytest.mark.parametrize("layer", [1 << 20, 1 << 27])
def test_limits_of_zero3_follow_the_packed_layer(layer):
    limits = zero3_limits(4096, layer)
    assert limits["stage3_max_reuse_distance"] == max(2 * layer, 1 << 25)
    assert limits["stage3_prefetch_bucket_size"] == layer
    assert limits["stage3_max_live_parameters"] >= 2 * layer
    assert limits["stage3_param_persistence_threshold"] < 4096 * 4096 // 4


@pytest.mark.parametrize(
    "section, words",
    [
        ({"bf16": True}, "bf16 = true, expected an object"),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params = [1], expected an object"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}, 'offload_optimizer = "cpu"'),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage = "auto", expected 1, 2 or 3'),
    ],
)
def test_a_section_that_is_no_object_and_a_stage_that_is_no_number_are_refused(tmp_path, section, words):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(section))
    with pytest.raises(UserError, match=re.escape(words)):
        read_deepspeed_config(str(path))


def test_null_counts_as_left_out(tmp_path):
    path = tmp_path / "ds.json"
    zero = {"stage": 1, "offload_optimizer": None}
    path.write_text(json.dumps({"zero_optimization": zero, "fp16": None, "optimizer": {"params": None}}))
    raw = read_deepspeed_config(str(path))
    assert raw == {"zero_optimization": {"stage": 1}, "optimizer": {}}
    assert fill(raw)["optimizer"]["params"]["lr"] == RUN.train.lr
