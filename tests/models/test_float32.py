"""A model that was trained in bfloat16 computes in float32, with the values of its weights unchanged."""

from __future__ import annotations

import pytest
import torch

from gdrt_ds.config import ModelSection
from gdrt_ds.inference.path_reader import make_reader
from gdrt_ds.models import float32
from gdrt_ds.models.built_in import make_tiny_model
from gdrt_ds.models.float32 import added_bytes, to_float32
from gdrt_ds.models.load import load_model
from gdrt_ds.models.quantization.nf4 import is_4bit
from gdrt_ds.runtime import Runtime

IDS = torch.tensor([[5, 7, 9, 11, 4, 3]])
TEXTS = ["The Matrix (1999)", "Toy Story (1995)", "Heat (1995)", "Alien (1979)", "Fargo (1996)"]
PLENTY = 1 << 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", TEXTS, 0, std=0.2)


def trained(path, quantization, dtype="bfloat16"):
    """A model with an adapter that changes something, as a training leaves it."""
    section = ModelSection(path=str(path), dtype=dtype, quantization=quantization, lora={"dropout": 0.0})
    loaded = load_model(section, Runtime(), train=True, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    loaded.model.eval().requires_grad_(False)
    return loaded, section


def logits(loaded):
    with torch.no_grad():
        return loaded.model(input_ids=IDS).logits


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_both_forms_compute_in_float32_with_the_trained_values(tiny, quantization, monkeypatch):
    """The reference is the trained model in float64: rounding of bfloat16 is a thousand times larger."""
    rounded, _ = trained(tiny, quantization)
    found = {}
    whole_bytes = added_bytes(rounded.model)
    for form, free in (("held", PLENTY), ("converted", 2 * whole_bytes - 2)):
        loaded, section = trained(tiny, quantization)
        monkeypatch.setattr(float32, "free_bytes", lambda device, free=free: free)
        loaded, whole, line = to_float32(loaded, section, Runtime())
        assert f"in float32 (trained in bfloat16; weights {form}" in line and whole is (form == "held")
        assert loaded.dtype == torch.float32 == make_reader(loaded.model, []).mask_dtype
        found[form] = logits(loaded)
        assert found[form].dtype == torch.float32
    monkeypatch.setattr(float32, "free_bytes", lambda device: PLENTY)
    exact = {}
    for form in found:
        reference, section = trained(tiny, quantization)
        for module in reference.model.modules():
            # Weights that stay packed are dequantised without the rounding to bfloat16 of the training.
            if is_4bit(module) and form == "converted":
                module.weight.quant_state.dtype = torch.float32
        to_float32(reference, section, Runtime())
        exact[form] = reference.model.double()(input_ids=IDS).logits
        assert (found[form] - exact[form]).abs().max() < 1e-5 * exact[form].abs().max()
    assert (logits(rounded).double() - exact["held"]).abs().max() > 1e-3 * exact["held"].abs().max()


def test_the_bytes_that_float32_adds_are_those_that_the_tensors_grow_by(tiny):
    for quantization in ("none", "nf4"):
        loaded, section = trained(tiny, quantization)

        def held():
            return sum(parameter.nbytes for parameter in set(loaded.model.parameters()))

        before, expected = held(), added_bytes(loaded.model)
        to_float32(loaded, section, Runtime())
        assert held() - before == expected > 0


def test_a_model_that_fits_in_no_form_stays_as_trained_and_says_so(tiny, monkeypatch):
    loaded, section = trained(tiny, "none")
    monkeypatch.setattr(float32, "free_bytes", lambda device: 0)
    same, _, line = to_float32(loaded, section, Runtime())
    assert same.dtype == torch.bfloat16 == logits(same).dtype
    assert "scoring: in bfloat16, as trained, because float32 needs" in line
