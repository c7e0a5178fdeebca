"""Every known bad combination is refused before any weight is loaded, with its thread number."""

import json
from pathlib import Path

import pytest

from gdrt_ds.config import RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.planning.compatibility import check_combination

GOOD = {"deepspeed": "0.19.8", "bitsandbytes": "0.50.2"}
ZERO3 = {"zero_optimization": {"stage": 3}}
PRESETS = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


def check(model=None, engine=None, cuda=False, **versions):
    check_combination(
        RunConfig(model=model or {}),
        ZERO3 if engine is None else engine,
        cuda=cuda,
        versions={**GOOD, **versions},
    )


def test_the_defaults_pass_on_cpu_and_gpu():
    check()
    check(cuda=True)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_every_preset_passes_on_the_machine_it_is_for(preset):
    check(engine=json.loads(preset.read_text()), cuda="offload" in preset.stem)


def test_all_six_presets_are_there():
    assert {p.stem for p in PRESETS} >= {"zero3_qlora", "zero3", "zero3_offload", "zero2", "zero1", "cpu"}


@pytest.mark.parametrize(
    "model, engine, cuda, versions, words",
    [
        ({}, None, False, {"deepspeed": "0.19.2"}, "#8066"),
        ({"gradient_checkpointing": True}, None, False, {"deepspeed": "0.19.1"}, "#8148"),
        ({}, None, False, {"bitsandbytes": "0.46.0"}, "0.47"),
        ({"quant_storage": "float32", "dtype": "bfloat16"}, None, False, {}, "destroys"),
        ({"quant_storage": "bfloat16", "dtype": "float16"}, None, True, {}, "destroys"),
        ({"quant_storage": "float16", "dtype": "bfloat16"}, None, False, {}, "destroys"),
        (
            {},
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            False,
            {},
            "zero_quantized_weights",
        ),
        (
            {},
            {
                "zero_optimization": {"stage": 3},
                "weight_quantization": {"quantized_initialization": {"num_bits": 8}},
            },
            False,
            {},
            "#1451",
        ),
        ({}, {"zero_optimization": {"stage": 0}}, False, {}, "sharded optimizer"),
        ({}, {}, False, {}, "sharded optimizer"),
        ({"lora": {"dora": True}}, None, False, {}, "where ZeRO-3 has freed it"),
        ({"lora": {"dora": True}, "quantization": "none"}, None, False, {}, "where ZeRO-3 has freed it"),
        (
            {"lora": {"dora": True}, "train_head": True},
            {"zero_optimization": {"stage": 2}},
            False,
            {},
            "lm_head row by row",
        ),
        (
            {"lora": {"trainable_tokens": "added"}, "train_head": True},
            None,
            False,
            {},
            "wraps lm_head either",
        ),
        (
            {"lora": {"dora": True, "targets": ["q_proj", "lm_head"]}},
            {"zero_optimization": {"stage": 2}},
            False,
            {},
            "lm_head row by row",
        ),
        (
            {"lora": {"trainable_tokens": ["!"], "targets": ["q_proj", "lm_head"]}},
            None,
            False,
            {},
            "wraps lm_head either",
        ),
        ({"lora": {"targets": []}}, None, False, {}, "no layer would get an adapter"),
        ({"loading": "sharded"}, {"zero_optimization": {"stage": 2}}, False, {}, "only stage 3"),
        (
            {},
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            True,
            {},
            "only stage 3 can offload",
        ),
        (
            {},
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            True,
            {},
            "swap files",
        ),
        (
            {},
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            False,
            {},
            "no GPU to offload",
        ),
        ({"dtype": "float16"}, None, False, {}, "no CPU path"),
        ({}, {**ZERO3, "torch_autocast": {"enabled": True}}, False, {}, "second dtype"),
        ({}, {**ZERO3, "checkpoint": {"load_universal": True}}, False, {}, "#5475"),
        ({}, {**ZERO3, "optimizer": {"type": "OneBitAdam"}}, False, {}, "onebitadam"),
        ({}, {**ZERO3, "tensor_parallel": {"autotp_size": 2}}, False, {}, "autotp_size"),
        ({"attention": "flash_attention_2"}, None, False, {}, "runs on a GPU"),
    ],
)
def test_a_known_bad_combination_is_refused_with_its_reason_and_a_way_out(
    model, engine, cuda, versions, words
):
    with pytest.raises(UserError) as error:
        check(model, engine, cuda, **versions)
    assert words in error.value.problem and error.value.fix


def test_dora_is_allowed_where_every_rank_holds_whole_weights():
    for stage in (1, 2):
        check({"lora": {"dora": True}}, {"zero_optimization": {"stage": stage}})


def test_storage_equal_to_the_arithmetic_is_allowed():
    check({"quant_storage": "bfloat16", "dtype": "bfloat16"})
    check({"quant_storage": "uint8", "dtype": "float16"}, cuda=True)


def test_a_skipped_step_needs_gradients_that_can_be_thrown_away():
    """Under stages 1 and 2 with an optimizer in host memory they wait there for the next step."""
    skip = RunConfig(train={"on_nonfinite": "skip"})
    for stage, device, refused in ((2, "cpu", True), (1, "cpu", True), (2, "none", False), (3, "cpu", False)):
        engine = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": device}}}
        if refused:
            with pytest.raises(UserError, match="on_nonfinite = skip with offload_optimizer"):
                check_combination(skip, engine, cuda=True, versions=GOOD)
        else:
            check_combination(skip, engine, cuda=True, versions=GOOD)
