"""Every family: whether its samples may stand in one row is decided from its layers, no sample sees
another, and a training step is the same packed and padded.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from gdrt_ds.batches import build_micro_batch
from gdrt_ds.batches.tree_attention import ATTENTION_NAME
from gdrt_ds.config import ModelSection, RunConfig
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.errors import UserError
from gdrt_ds.files import REPOSITORY
from gdrt_ds.models import packing as packing_choice
from gdrt_ds.models.layer_types import layer_types
from gdrt_ds.models.load import load_model
from gdrt_ds.models.packing import choose_packing, packing_obstacle
from gdrt_ds.models.skeleton import skeleton
from gdrt_ds.models.source import read_model_config
from gdrt_ds.training.model_with_loss import FusedLossModel
from tests.models.family_models import FAMILIES, family_table, make_family

RUNTIME = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1)
SHARED = 4
"""Tokens that all prompts start with."""
LENGTHS = (14, 11, 9, 12)
"""Tokens of the samples A, B, C, D. B is the one whose losses are watched."""
TARGETS = (2, 5, 3, 4)
SECOND = slice(TARGETS[0], TARGETS[0] + TARGETS[1])
"""B's losses among those of the row."""
ROUNDING = 2e-5
"""Largest difference, in nats, of losses that are equal but for the order of float32 sums."""
LEAK = 1e-3
"""Smallest difference of B's losses, in nats, that a leak makes in these models."""
WITH_LEAK = [name for name, family in FAMILIES.items() if not family.packs and name != "gemma2"]
PACKED = [name for name, family in FAMILIES.items() if family.packs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def make_store(seeds=(1, 2, 3, 4), lengths=LENGTHS) -> TokenStore:
    """Samples of random tokens behind a common start; a sample's tokens follow from its seed and
    length."""
    start = np.random.default_rng(0).integers(3, 250, SHARED)
    rows = [
        np.concatenate([start, np.random.default_rng(seed).integers(3, 250, length)])
        for seed, length in zip(seeds, lengths, strict=True)
    ]
    ids = np.concatenate(rows).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    targets = np.array(TARGETS, np.int32)
    target_offsets = np.concatenate([[0], np.cumsum(targets)]).astype(np.int64)
    return TokenStore(ids, offsets, np.zeros(len(ids), np.int8), targets, target_offsets)


def run_config(path, packing="auto", **model) -> RunConfig:
    return RunConfig(model={"path": str(path), **model}, train={"packing": packing})


def load_family(path, packing: str, train: bool = False) -> FusedLossModel:
    """The family as training loads it for rows of this packing."""
    section = ModelSection(
        path=str(path),
        quantization="none",
        dtype="float32",
        lora={"dropout": 0.0, "r": 4, "targets": "all-linear"},
    )
    attention = None if packing == "none" else ATTENTION_NAME
    loaded = load_model(section, RUNTIME, train=train, attention=attention)
    return FusedLossModel(loaded.model)


def losses_of(model: FusedLossModel, store: TokenStore, packing: str) -> torch.Tensor:
    """The losses of all target tokens, sample by sample."""
    micro = build_micro_batch(store, np.arange(4), packing, SHARED, 2)
    return model(micro, torch.zeros(len(micro.labels), dtype=torch.long), 1)[1]


def largest_change_of_the_second(model: FusedLossModel, packing: str, store: TokenStore) -> float:
    """By how many nats B's losses differ from those beside the usual samples."""
    with torch.no_grad():
        usual = losses_of(model, make_store(), packing)[SECOND]
        return float((losses_of(model, store, packing)[SECOND] - usual).abs().max())


def ways_to_pack(name: str) -> list[str]:
    if FAMILIES[name].packs:
        return ["packed", "shared_prefix"]
    return ["none"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_decide_about_packing_and_one_line_says_why(folder, name):
    family = FAMILIES[name]
    path = make_family(name, folder)
    packing, line = choose_packing(run_config(path), read_model_config(path))
    assert (packing == "shared_prefix") == family.packs
    assert line.startswith(f"packing: {packing} (auto: ") and family.why_not in line
    if family.packs:
        assert choose_packing(run_config(path, "packed"), read_model_config(path))[0] == "packed"
        return
    with pytest.raises(UserError, match="train.packing = packed") as error:
        choose_packing(run_config(path, "packed"), read_model_config(path))
    assert family.why_not in error.value.problem and "train.packing=auto" in error.value.fix


def test_layers_that_nobody_listed_are_not_packed(folder):
    """A layer may fail in ways that no list of forbidden layers foresees; unknown is enough not to
    pack."""
    path = make_family("llama", folder)
    model = skeleton(read_model_config(path))
    assert layer_types(model).mixing == ""
    model.model.layers[1].mlp = torch.nn.GRU(32, 32)
    assert "GRU" in layer_types(model).mixing


@pytest.mark.parametrize(
    "config, reason",
    [
        (transformers.DogeConfig(num_hidden_layers=1), "DogeAttention makes its attention mask itself"),
        (
            transformers.PhimoeConfig(num_hidden_layers=1, sliding_window=9),
            "does not hand its sliding window",
        ),
        (transformers.GptOssConfig(num_hidden_layers=2), "GptOssAttention computes with s_aux"),
    ],
)
def test_attention_that_does_more_than_the_layout_says_is_not_packed(config, reason):
    assert reason in packing_obstacle(layer_types(skeleton(config)), config)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_sample_of_a_row_changes_the_losses_of_another(folder, name):
    path = make_family(name, folder)
    for packing in ways_to_pack(name):
        model = load_family(path, packing)
        for seeds in ((5, 2, 3, 4), (1, 2, 6, 7), (5, 2, 6, 7)):
            change = largest_change_of_the_second(model, packing, make_store(seeds))
            # Routed experts work on as many rows as tokens came to them, which changes the order of sums.
            assert change <= (ROUNDING if "moe" in name else 0.0), (packing, seeds, change)
        for lengths in ((10, 11, 9, 12), (14, 11, 13, 6), (8, 11, 16, 9)):
            change = largest_change_of_the_second(model, packing, make_store(lengths=lengths))
            assert change <= ROUNDING, (packing, lengths, change)


@pytest.mark.parametrize("name", WITH_LEAK)
def test_without_the_allow_list_the_samples_of_a_row_leak(folder, name, monkeypatch):
    """The mutation of the test above: the decision is emptied of its checks, and the leak is
    seen."""
    monkeypatch.setattr(packing_choice, "packing_obstacle", lambda layers, config: "")
    monkeypatch.setattr(packing_choice, "_sdpa_obstacle", lambda config: "")
    path = make_family(name, folder)
    packing, _ = choose_packing(run_config(path, "packed"), read_model_config(path))
    assert packing == "packed"
    model = load_family(path, packing)
    assert largest_change_of_the_second(model, packing, make_store((5, 2, 3, 4))) > LEAK


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_is_the_same_packed_and_padded(folder, name):
    path = make_family(name, folder)
    before, after = {}, {}
    for packing in dict.fromkeys(["none", *ways_to_pack(name)]):
        model = load_family(path, packing, train=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = losses_of(model, make_store(), packing)
        losses.mean().backward()
        optimizer.step()
        before[packing] = losses.detach()
        after[packing] = losses_of(model, make_store(), packing).detach()
    assert after["none"].mean() < before["none"].mean()
    for packing in before:
        assert torch.allclose(before[packing], before["none"], atol=ROUNDING), packing
        assert torch.allclose(after[packing], after["none"], atol=1e-3), packing


def test_the_table_of_the_docs_says_what_these_tests_show():
    page = (REPOSITORY / "docs" / "support-matrix.md").read_text(encoding="utf-8")
    for line in family_table():
        assert line in page, f"docs/support-matrix.md lacks: {line}"
