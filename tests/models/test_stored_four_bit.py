"""Checkpoints that are bitsandbytes 4-bit already: read as they are, trained, exported; or refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from gdrt_ds.config import RunConfig, dump_config
from gdrt_ds.errors import UserError
from gdrt_ds.inference.exporting import export
from gdrt_ds.models.quantization.nf4 import dequantise, is_4bit
from tests.distributed.scenario_sharded import store_in_four_bit
from tests.models.family_models import make_family
from tests.models.steps import five_steps
from tests.models.test_model import load
from tests.planning.test_plan_families import plan_of

IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_family("llama", tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def stored(plain):
    return store_in_four_bit(plain)


def changed(stored, folder, **quantization):
    """The checkpoint with another quantization_config."""
    path = shutil.copytree(stored, folder / "changed")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(quantization)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_it_computes_bitwise_what_quantising_the_plain_model_gives(plain, stored):
    ours, other = load(stored, train=False), load(plain, train=False)
    assert (
        "base: NF4 with double quantisation as the checkpoint stores it, not quantised again" in ours.lines[2]
    )
    layer, same = (x.model.model.layers[0].mlp.up_proj for x in (ours, other))
    assert is_4bit(layer) and torch.equal(layer.weight, same.weight)
    with torch.no_grad():
        assert torch.equal(ours.model(input_ids=IDS).logits, other.model(input_ids=IDS).logits)


def test_a_checkpoint_made_for_another_dtype_computes_in_the_one_that_is_set(stored, tmp_path):
    path = changed(stored, tmp_path, bnb_4bit_compute_dtype="bfloat16")
    loaded = load(path, train=False)
    assert loaded.model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32


def test_an_adapter_trains_on_it_and_the_packed_weights_stay(stored):
    loaded = load(stored, lora={"dropout": 0.0})
    layer = loaded.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    before = layer.weight.clone()
    losses = five_steps(loaded.model, IDS)
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(layer.weight, before)


def test_it_can_be_exported_as_ordinary_layers(stored):
    loaded = load(stored, train=False)
    with torch.no_grad():
        packed = loaded.model(input_ids=IDS).logits
        plain = dequantise(loaded.model)
        assert not any(is_4bit(module) for module in plain.modules())
        assert torch.allclose(plain(input_ids=IDS).logits, packed, atol=1e-4)
    assert not hasattr(plain.config, "quantization_config")


def test_the_plan_takes_it(stored, tmp_path, capsys):
    plan_of(stored, tmp_path, "prompt.max_length=600")
    assert "memory per rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    "quantization, settings, words",
    [
        ({}, ["model.quantization=none"], "holds 4-bit weights"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, ["model.dtype=float32"], "destroys them silently"),
        ({"llm_int8_skip_modules": ["nothing"]}, [], "stores its lm_head in 4 bits"),
    ],
)
def test_the_plan_refuses_what_would_compute_wrong_results(stored, tmp_path, quantization, settings, words):
    path = changed(stored, tmp_path, **quantization)
    with pytest.raises(UserError, match=words) as error:
        plan_of(path, tmp_path, "prompt.max_length=600", *settings)
    assert error.value.fix


def test_a_run_on_it_is_exported_from_the_dequantised_weights(stored, tmp_path):
    run = tmp_path / "run"
    loaded = load(stored)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    loaded.model.save_pretrained(run / "adapter", save_embedding_layers=False)
    (run / "config.yaml").write_text(dump_config(RunConfig(model={"path": str(stored), "dtype": "float32"})))
    with pytest.raises(UserError, match="there are no plain ones"):
        export(run, tmp_path / "merged")
    export(run, tmp_path / "merged", base="trained")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = loaded.model.eval()(input_ids=IDS).logits
        assert torch.allclose(found(input_ids=IDS).logits, expected, atol=1e-4)
