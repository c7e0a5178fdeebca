"""The measurement after loading sees a leak where there is one, and nothing where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gdrt_ds.batches import build_micro_batch
from gdrt_ds.errors import UserError
from gdrt_ds.models.attention.base import PACKINGS
from gdrt_ds.models.source import read_model_config
from gdrt_ds.training.leak_check import SEEDS, SHARED, Leak, confirm_packing, measure_leak, probe
from tests.models.family_models import FAMILIES, make_family
from tests.models.test_families import load_family

CPU = torch.device("cpu")
LEAKY = ("qwen3_next", "qwen3_5", "lfm2", "falcon_h1", "gpt_oss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("leak")


def confirm(folder, name, wanted, packing, dtype=torch.float32):
    """What is said of rows of this packing; a half dtype only widens what losses may move by."""
    path = make_family(name, folder)
    model = load_family(path, packing)
    return confirm_packing(wanted, packing, model, read_model_config(path), 2, dtype, CPU)


@pytest.mark.parametrize("vocabulary", [3, 50, 272, 128_256])
@pytest.mark.parametrize("packing", PACKINGS)
def test_in_every_packing_a_stands_before_b_and_c_behind_it(packing, vocabulary):
    """A prefix tree sorts its rows, and begins with the longest."""
    for seeds in SEEDS:
        store = probe(vocabulary, seeds)
        micro = build_micro_batch(store, np.arange(3), packing, SHARED, 2)
        a, b, c = (
            micro.supervised[first:stop].tolist()
            for first, stop in zip(store.target_offsets, store.target_offsets[1:])
        )
        assert max(a) < min(b) and max(b) < min(c)


@pytest.mark.parametrize("packing", ["packed", "prefix_tree"])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.packs])
def test_packed_families_are_confirmed(folder, name, packing):
    found, line = confirm(folder, name, "auto", packing)
    assert found == packing and "measured on a probe row" in line


@pytest.mark.parametrize("name", LEAKY)
def test_a_leak_that_the_choice_had_missed_is_measured(folder, name):
    """What would happen if the allow-list had let the family pass, under the wider tolerance, too."""
    for packing in ("packed", "prefix_tree"):
        for dtype in (torch.float32, torch.bfloat16):
            found, line = confirm(folder, name, "auto", packing, dtype)
            assert found == "none" and line.startswith("packing: none (auto: measured")
        with pytest.raises(UserError, match=f"train.packing = {packing} would let the samples"):
            confirm(folder, name, packing, packing)


def carry_on(share: float):
    """A planted leak: every token gets a share of the mean of all tokens before it, whoever's they are."""

    def hook(module, arguments, hidden):
        count = torch.arange(1, hidden.shape[1] + 1).reshape(1, -1, 1)
        return hidden + share * hidden.cumsum(1) / count

    return hook


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_faint_recurrence_over_the_whole_row_is_caught_and_the_control_stays_at_rest(folder, packing):
    path = make_family("llama", folder)
    model = load_family(path, packing)
    model.model.get_input_embeddings().register_forward_hook(carry_on(1e-3))
    leak = measure_leak(model, packing, read_model_config(path).vocab_size, 2, CPU)
    assert leak.after == 0.0, "nothing that stands behind B can reach it"
    assert 1e-4 < leak.before < 1e-2 and leak.found(torch.float32)


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
