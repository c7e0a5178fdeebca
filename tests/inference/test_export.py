"""Exported models load in transformers alone and give the logits of base + adapter."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gdrt_ds.config import RunConfig, dump_config
from gdrt_ds.errors import UserError
from gdrt_ds.export import export
from gdrt_ds.models.built_in import make_tiny_model
from tests.models.test_model import TEXTS, load


def make_run(folder, tie=False, **model):
    path = make_tiny_model(folder / "tiny", TEXTS, 0, tie_embeddings=tie)
    run = folder / "run"
    run.mkdir()
    loaded = load(path, **model)
    torch.manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    loaded.model.save_pretrained(run / "adapter", save_embedding_layers=False)
    (run / "config.yaml").write_text(dump_config(RunConfig(model={"path": str(path), **model})))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        return run, ids, loaded.model.eval()(input_ids=ids).logits


def test_the_base_as_trained_gives_the_logits_of_the_quantised_model(tmp_path):
    run, ids, expected = make_run(tmp_path)
    done = export(run, tmp_path / "out", "float32", "trained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([300]) is not None
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    assert done["max_difference"] < 1e-4 and not any("lora" in name for name, _ in model.named_parameters())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "dequantised from NF4" in card and "objective: gdrt" in card


def test_a_tied_model_with_an_adapted_head_is_untied_when_merged(tmp_path):
    run, ids, expected = make_run(tmp_path, tie=True, train_head=True, quantization="none")
    export(run, tmp_path / "out", "float32", shard_size="50KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_exports_refuse_unfinished_runs_and_folders_in_use(tmp_path):
    run, *_ = make_run(tmp_path)
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        export(run, tmp_path / "busy")
    with pytest.raises(UserError, match="not a run folder"):
        export(tmp_path / "busy", tmp_path / "out")
