"""Whether decoder, output matrix and scaling give a model's own logits is measured for unknown families."""

from __future__ import annotations

import pytest
import torch
import transformers

from gdrt_ds.config import ModelSection
from gdrt_ds.errors import UserError
from gdrt_ds.inference.recommender import load_checked
from gdrt_ds.models.families import lm_head_scaling
from gdrt_ds.models.head_check import COMPARED, confirm_head, probe_inputs
from gdrt_ds.runtime import Runtime
from tests.models.family_models import FAMILIES, family_config

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CPU = torch.device("cpu")


def model_of(name: str, **settings):
    """A random model whose logits are several nats wide."""
    config = getattr(transformers, name)(**{**SMALL, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model


def confirmed(model) -> str:
    return confirm_head(model, *probe_inputs(model, CPU), torch.float32)


def test_every_family_that_is_not_measured_is_one_that_a_test_compares():
    assert COMPARED == {family_config(name, 120).model_type for name in FAMILIES}


@pytest.mark.parametrize(
    "name, settings, scaling",
    [
        ("HyperCLOVAXConfig", {"logits_scaling": 0.125}, (0.125, None)),
        (
            "RecurrentGemmaConfig",
            {"logits_soft_cap": 2.0, "lru_width": 32, "num_key_value_heads": 1},
            (1.0, 2.0),
        ),
        ("Qwen2Config", {}, (1.0, None)),
    ],
)
def test_scales_and_caps_under_their_other_names_are_known(name, settings, scaling):
    model = model_of(name, **settings)
    assert lm_head_scaling(model.config) == scaling
    assert "the model's own log-probabilities, within" in confirmed(model)


def test_a_layer_between_decoder_and_output_matrix_is_refused():
    model = model_of("ModernBertDecoderConfig", global_rope_theta=10000.0)
    with pytest.raises(UserError, match="model_type modernbert-decoder: .* differ by") as caught:
        confirmed(model)
    assert "llama" in caught.value.fix


def test_a_scale_that_nobody_knows_is_refused_and_the_mode_of_the_model_is_kept(tmp_path):
    model = model_of("Qwen2Config").train()
    plain = model.forward

    def scaled(*args, **kwargs):
        found = plain(*args, **kwargs)
        found.logits = 1.5 * found.logits
        return found

    model.forward = scaled
    with pytest.raises(UserError, match="differ by"):
        confirmed(model)
    assert model.training


def test_scoring_measures_it_too(tmp_path, monkeypatch):
    from tests.models.family_models import make_family

    path = make_family("llama", tmp_path)
    config = transformers.AutoConfig.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen2Config(**{**SMALL, "vocab_size": config.vocab_size})
    )
    model.save_pretrained(path)
    section = ModelSection(path=str(path), dtype="float32", quantization="none")
    run = type("Config", (), {"model": section})
    _, lines = load_checked(run, Runtime(), path, None)
    assert any(line.startswith("head: the model's own") for line in lines)
    monkeypatch.setattr("gdrt_ds.models.head_check.lm_head_scaling", lambda config: (2.0, None))
    with pytest.raises(UserError, match="model_type qwen2"):
        load_checked(run, Runtime(), path, None)
