"""rsLoRA and DoRA: what they compute, that they train, are scored exactly and can be merged."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from eval.scoring import per_item_scores
from gdrt_ds.inference.catalogue_scoring import CatalogueScorer
from gdrt_ds.inference.exporting import export
from gdrt_ds.inference.path_reader import make_reader
from tests.eval.scoring_models import catalogue_tokens, head_and_prompts, trie_of
from tests.inference.test_export import logits, make_run
from tests.models.family_models import make_family
from tests.models.test_model import load

IDS = torch.arange(3, 20)[None]
START, PROMPTS = head_and_prompts()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_family("llama", tmp_path_factory.mktemp("kinds"))


def trained(path, **lora):
    """A model after a few steps, and its losses."""
    loaded = load(path, lora={"dropout": 0.0, "targets": "all-linear", **lora})
    optimizer = torch.optim.AdamW([p for p in loaded.model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = loaded.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return loaded, losses


def test_rslora_scales_by_the_root_of_the_rank(path):
    loaded = load(path, lora={"r": 16, "alpha": 8, "rslora": True})
    layer = loaded.model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / math.sqrt(16)
    assert any("adapter: rsLoRA r=16" in line for line in loaded.lines)


@pytest.mark.parametrize("kind", [{"rslora": True}, {"dora": True}, {"dora": True, "rslora": True}])
def test_it_starts_at_the_base_trains_and_is_scored_exactly(path, kind):
    base = load(path, train=False)
    with torch.no_grad():
        start = base.model(input_ids=IDS, labels=IDS).loss.item()
    loaded, losses = trained(path, **kind)
    assert losses[0] == pytest.approx(start, rel=1e-5) and losses[-1] < losses[0] - 0.2
    model = loaded.model.eval()
    trie = trie_of(catalogue_tokens(12))
    found = CatalogueScorer(make_reader(model, START), trie).score(PROMPTS[:2])
    for row, prompt in zip(found, PROMPTS[:2], strict=True):
        assert torch.allclose(row, per_item_scores(model, trie, prompt), atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", [{"rslora": True}, {"dora": True}])
def test_it_is_exported_with_the_logits_of_base_and_adapter(tmp_path, kind):
    run, expected = make_run(tmp_path, lora={"targets": "all-linear", "dropout": 0.0, **kind})
    for base in ("plain", "trained"):
        export(run, tmp_path / base, base=base)
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / base)
        if base == "trained":
            assert torch.allclose(logits(found), expected, atol=1e-4)


def test_dora_learns_the_length_of_every_row(path):
    loaded, _ = trained(path, dora=True)
    lengths = {n: p for n, p in loaded.model.named_parameters() if "lora_magnitude_vector" in n}
    assert len(lengths) == 2 * 7 and all(p.requires_grad for p in lengths.values())
    fresh = dict(load(path, lora={"dora": True, "targets": "all-linear"}).model.named_parameters())
    assert all(not torch.equal(parameter, fresh[name]) for name, parameter in lengths.items())
