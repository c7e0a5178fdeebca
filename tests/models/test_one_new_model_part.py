"""A new attention backend and a new quantization are one file each: the docs' examples are found and used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gdrt_ds.config import ModelSection, RunConfig, load_config
from gdrt_ds.errors import UserError
from gdrt_ds.inference.prompt_reader import PromptReader
from gdrt_ds.models.built_in import make_tiny_model
from gdrt_ds.models.fingerprint import base_fingerprint
from gdrt_ds.models.load import load_model
from gdrt_ds.models.packing import choose_packing
from gdrt_ds.models.source import read_model_config
from tests.models.steps import five_steps
from tests.rooms import EXAMPLES, room_with

RUNTIME = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1)
IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("new") / "tiny", ["Alien (1979)"], 0)


@pytest.fixture
def with_backend():
    with room_with("gdrt_ds.models.attention", EXAMPLES / "attention"):
        yield


@pytest.fixture
def with_quantization():
    with room_with("gdrt_ds.models.quantization", EXAMPLES / "quantization"):
        yield


def load(tiny, train=False, **changes):
    section = ModelSection(**{"path": str(tiny), "quantization": "none", "dtype": "float32", **changes})
    return load_model(section, RUNTIME, train=train)


def run(loaded):
    """Logits, and the names of the operators that were called."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        logits = loaded.model(input_ids=IDS).logits
    return logits, {event.key for event in profile.key_averages()}


def test_a_new_attention_backend_is_chosen_by_its_file_name_announced_and_used(with_backend, tiny):
    own, sdpa = load(tiny, attention="math_sdpa"), load(tiny, attention="sdpa")
    assert own.lines[0] == "attention: math_sdpa (as set)" and own.attention == "math_sdpa"
    logits, called = run(own)
    expected, called_by_sdpa = run(sdpa)
    assert "aten::_scaled_dot_product_attention_math" in called
    assert "aten::_scaled_dot_product_attention_math" not in called_by_sdpa
    assert torch.allclose(logits, expected, atol=1e-5)


def test_the_new_backend_itself_says_that_it_takes_masks_and_does_not_pack(with_backend, tiny):
    own = load(tiny, attention="math_sdpa")
    PromptReader(own.model, [1])
    assert own.model.config._attn_implementation == "math_sdpa"
    config = RunConfig(model={"path": str(tiny), "attention": "math_sdpa"})
    packing = choose_packing(config, read_model_config(tiny))
    assert packing == ("none", "packing: none (auto: model.attention = math_sdpa is set)")
    with pytest.raises(UserError, match="needs the tree attention, but model.attention = math_sdpa"):
        choose_packing(
            config.model_copy(update={"train": config.train.model_copy(update={"packing": "packed"})}),
            read_model_config(tiny),
        )


def test_a_new_quantization_rounds_all_linear_weights_but_lm_head(with_quantization, tiny):
    rounded, plain = load(tiny, quantization="round4"), load(tiny)
    assert any(line.startswith("base: rounded to 4 bits") for line in rounded.lines)
    layer = rounded.model.model.layers[0].mlp.up_proj.weight
    original = plain.model.model.layers[0].mlp.up_proj.weight
    assert max(len(row.unique()) for row in layer) <= 16 < len(original[0].unique())
    assert ((layer - original).abs().amax(1) <= original.abs().amax(1) / 14 + 1e-6).all()
    assert torch.equal(rounded.model.lm_head.weight, plain.model.lm_head.weight)
    assert (
        rounded.fingerprint
        != plain.fingerprint
        == base_fingerprint(tiny, ModelSection(path=str(tiny), quantization="none"), torch.float32)
    )


def test_an_adapter_trains_on_the_new_quantization_and_the_base_stays(with_quantization, tiny):
    loaded = load(tiny, train=True, quantization="round4", lora={"dropout": 0.0})
    before = loaded.model.get_base_model().model.layers[0].self_attn.o_proj.weight.clone()
    losses = five_steps(loaded.model, IDS)
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(loaded.model.get_base_model().model.layers[0].self_attn.o_proj.weight, before)


def test_under_zero_3_the_new_quantization_sees_whole_weights_and_says_so(with_quantization, tiny):
    section = ModelSection(path=str(tiny), quantization="round4")
    zero_3 = {"zero_optimization": {"stage": 3}}
    loaded = load_model(section, RUNTIME, train=False, deepspeed_config=zero_3)
    assert loaded.loading == "stock"
    assert "model.quantization = round4 needs whole weights" in loaded.lines[1]


@pytest.mark.parametrize("setting, near", [("attention=sdap", "sdpa"), ("quantization=nf5", "nf4")])
def test_a_wrong_name_is_refused_with_the_nearest_and_all_names(setting, near):
    with pytest.raises(UserError, match=f"did you mean `{near}`") as error:
        load_config(None, [f"model.{setting}"])
    assert ("flash_attention_2" in str(error.value)) == (near == "sdpa")


def test_without_its_file_the_backend_is_unknown():
    with pytest.raises(UserError, match="math_sdpa"):
        load_config(None, ["model.attention=math_sdpa"])
