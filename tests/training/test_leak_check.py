"""The measurement after loading sees a leak where there is one, and nothing where there is none."""

from __future__ import annotations

import pytest
import torch

from gdrt_ds.errors import UserError
from gdrt_ds.models.source import read_model_config
from gdrt_ds.training.leak_check import Leak, confirm_packing, measure_leak
from tests.models.family_models import FAMILIES, make_family
from tests.models.test_families import load_family

CPU = torch.device("cpu")
LEAKY = ("qwen3_next", "qwen3_5", "lfm2", "falcon_h1", "gpt_oss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("leak")


def confirm(folder, name, wanted):
    path = make_family(name, folder)
    model = load_family(path, "packed")
    return confirm_packing(wanted, "packed", model, read_model_config(path), 2, torch.float32, CPU)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.packs])
def test_packed_families_are_confirmed(folder, name):
    packing, line = confirm(folder, name, "auto")
    assert packing == "packed" and "measured on a probe row" in line


@pytest.mark.parametrize("name", LEAKY)
def test_a_leak_that_the_choice_had_missed_is_measured(folder, name):
    """What would happen if the allow-list had let the family pass."""
    packing, line = confirm(folder, name, "auto")
    assert packing == "none" and line.startswith("packing: none (auto: measured")
    with pytest.raises(UserError, match="train.packing = packed would let the samples"):
        confirm(folder, name, "packed")


def test_the_engine_stays_in_its_mode(folder):
    model = load_family(make_family("llama", folder), "packed")
    for mode in (True, False):
        model.train(mode)
        assert measure_leak(model, "shared_prefix", 250, 2, CPU).before == 0.0
        assert model.training == mode


def test_experts_may_move_losses_in_half_precision_as_much_as_in_the_control():
    assert not Leak(before=0.2, after=0.05).found(torch.bfloat16)
    assert Leak(before=0.6, after=0.05).found(torch.bfloat16)
    assert Leak(before=1e-3, after=0.0).found(torch.float32)
    assert Leak(before=0.05, after=0.05).found(torch.float32)  # nothing is masked at all
    assert not Leak(before=float("nan"), after=float("nan")).found(torch.float32)
