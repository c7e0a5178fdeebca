"""Exports tensor by tensor: the values of the merge in memory, for every kind of adapter and family."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gdrt_ds.config import ModelSection, RunConfig, dump_config
from gdrt_ds.inference import layer_by_layer, merging
from gdrt_ds.inference.exporting import export
from gdrt_ds.inference.layer_by_layer import CannotStream, logits_layer_by_layer
from gdrt_ds.models import base_values
from gdrt_ds.models.base_values import Place
from gdrt_ds.models.float32 import to_float32
from gdrt_ds.models.load import load_model
from gdrt_ds.models.weight_writer import TensorShape, write_file
from gdrt_ds.runtime import Runtime
from tests.distributed.scenario_sharded import store_in_four_bit
from tests.models.family_models import make_family
from tests.models.test_model import load
from tests.models.test_token_rows import make_folder


def make_run(path, folder, **model):
    """A run folder as far as the export reads it, with an adapter of random weights."""
    loaded = load(path, **model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    loaded.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    config = RunConfig(model={"path": str(path), "dtype": "float32", **model})
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def weights(folder):
    """Every tensor of a folder; the index, where there is one, names the file that it is in."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        index = json.loads(index.read_text())
        assert set(index["weight_map"]) == set(found)
        return found, index["metadata"]
    return found, None


def assert_same_model(run, output, base, dtype="auto"):
    """Exports in both ways and compares every tensor bitwise, and every other file but the card."""
    done = export(run, output / "tensors", dtype, base, shard_size="20KB")
    export(run, output / "memory", dtype, base, shard_size="20KB", in_memory=True)
    assert done["merged"] == "tensor by tensor"
    ours, our_index = weights(output / "tensors")
    theirs, their_index = weights(output / "memory")
    assert set(ours) == set(theirs)
    assert our_index == their_index and our_index is not None
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    for file in (output / "memory").iterdir():
        if file.name != "README.md" and not file.name.startswith("model"):
            assert (output / "tensors" / file.name).read_bytes() == file.read_bytes(), file.name
    return done


pytestmark = pytest.mark.slow

KINDS = {
    "nf4": {},
    "single": {"double_quant": False},
    "plain": {"quantization": "none", "lora": {"targets": "all-linear"}},
    "rslora": {"lora": {"rslora": True, "targets": "all-linear"}},
    "dora": {"lora": {"dora": True, "targets": "all-linear"}},
    "head": {"train_head": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16", "double_quant": False},
    "bfloat16_plain": {"dtype": "bfloat16", "quantization": "none"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_gives_the_bits_of_the_merge_in_memory(tmp_path, kind):
    run = make_run(make_family("llama", tmp_path), tmp_path / "run", **KINDS[kind])
    for base in ("plain", "trained"):
        assert_same_model(run, tmp_path / base, base)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_base_as_trained_gives_the_scores_of_a_training_in_bfloat16(tmp_path, quantization):
    model = {"dtype": "bfloat16", "quantization": quantization}
    run = make_run(make_family("llama", tmp_path), tmp_path / "run", **model)
    export(run, tmp_path / "out", "float32", "trained")
    section = ModelSection(path=str(tmp_path / "llama"), **model)
    evaluated = load_model(section, Runtime(), train=False, adapter=run / "adapter")
    evaluated, _, _ = to_float32(evaluated, section, Runtime())
    expected = logits(evaluated.model)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("dtype: bfloat16", "dtype: float32"))
    export(run, tmp_path / "float32", "float32", "trained")
    other = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "float32"))
    assert (found - expected).abs().max() < 0.02 * (other - expected).abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_trained_token_rows_are_merged_into_tied_and_untied_heads(tmp_path, tied):
    lora = {"dropout": 0.0, "trainable_tokens": "added"}
    run = make_run(make_folder(tmp_path, tied), tmp_path / "run", lora=lora)
    assert_same_model(run, tmp_path, "trained")


def test_a_base_stored_in_four_bits_is_dequantised_tensor_by_tensor(tmp_path):
    path = store_in_four_bit(make_family("llama", tmp_path))
    assert_same_model(make_run(path, tmp_path / "run"), tmp_path, "trained", "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_dtypes_are_rounded_as_the_merge_in_memory_does(tmp_path, dtype):
    run = make_run(make_family("llama", tmp_path), tmp_path / "run")
    assert_same_model(run, tmp_path, "trained", dtype)


TENSOR_BY_TENSOR = [
    "mistral_window",
    "lfm2",
    "qwen3_5",
    "falcon_h1",
    "gpt_oss",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "gpt2",
    "granite",
    "cohere",
]


@pytest.mark.parametrize("family", TENSOR_BY_TENSOR)
def test_families_are_merged_tensor_by_tensor(tmp_path, family):
    path = make_family(family, tmp_path)
    run = make_run(path, tmp_path / "run", lora={"targets": "all-linear"})
    for base in ("plain", "trained"):
        assert_same_model(run, tmp_path / base, base)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_families_whose_stored_tensors_are_converted_are_merged_in_memory_and_it_is_said(tmp_path, family):
    run = make_run(make_family(family, tmp_path), tmp_path / "run")
    done = export(run, tmp_path / "out")
    assert done["merged"].startswith("in memory, because transformers converts the stored weights")
    assert done["check"] == "loaded by transformers"


class ReadsTheOther(torch.nn.Module):
    """Computes with the weight of a module beside it, past that module's forward."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 3, bias=False)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=torch.nn.functional.linear(input_ids.float(), self.inner.weight))


def test_a_weight_that_is_read_past_its_module_is_never_computed_with_while_it_is_empty(monkeypatch):
    with torch.device("meta"):
        model = ReadsTheOther()
    places = {"inner.weight": Place(model.inner, "weight", model.inner.weight)}
    monkeypatch.setattr(layer_by_layer, "decoder_layers", lambda model: [])
    with pytest.raises(CannotStream, match="linear"):
        logits_layer_by_layer(places, lambda name: iter(torch.eye(3)), model, torch.ones(1, 3))
    assert model.inner.weight is places["inner.weight"].tensor
    monkeypatch.setattr(layer_by_layer, "decoder_layers", lambda model: [model])
    found = logits_layer_by_layer(places, lambda name: iter(2 * torch.eye(3)), model, torch.ones(1, 3))
    assert torch.equal(found, torch.full((1, 3), 2.0))


def test_large_matrices_are_merged_and_multiplied_in_blocks_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "MERGED_AT_ONCE", 320)
    monkeypatch.setattr(layer_by_layer, "AT_ONCE", 320)
    monkeypatch.setattr(base_values, "PIECE", 448)
    run = make_run(make_family("llama", tmp_path), tmp_path / "run", lora={"targets": "all-linear"})
    done = export(run, tmp_path / "blocks", "float32", "trained")
    export(run, tmp_path / "memory", "float32", "trained", in_memory=True)
    ours, _ = weights(tmp_path / "blocks")
    for name, tensor in weights(tmp_path / "memory")[0].items():
        assert torch.allclose(ours[name], tensor, rtol=1e-6, atol=1e-7), name
    assert done["max_difference"] < 1e-4


def test_files_are_those_that_safetensors_writes(tmp_path):
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(2, 4).bfloat16(),
        "a.count": torch.arange(3),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 3),
        "half": torch.ones(1).half(),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    shapes = {name: TensorShape(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_file(tmp_path / "ours", shapes, lambda name: tensors[name].reshape(-1).split(2))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(ValueError, match="a.count: 16 bytes for a tensor of 24"):
        write_file(tmp_path / "ours", shapes, lambda name: [tensors[name].reshape(-1)[:2]])
