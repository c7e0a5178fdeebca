"""Merged prefixes train as padded samples do: losses of each sample, gradients of LoRA, and dropout masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from gdrt_ds.batches import MicroBatch, build_micro_batch
from gdrt_ds.batches.prefix_tree import merge_prefixes
from gdrt_ds.batches.tree_attention import ATTENTION_NAME
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.models.families import decoder, lm_head
from gdrt_ds.models.prefix_dropout import use_prefix_dropout
from tests.batches.test_tree_attention import FAMILIES, make_model, random_tree_store, store_of

MANY_SEEDS, FEW_SEEDS = 12, 2
MANY = ("llama", "gemma3")
"""Families with many random trees: a plain one, and one with layers that see a window only."""


def with_lora(model: torch.nn.Module, dropout: float = 0.0) -> torch.nn.Module:
    """LoRA on every linear layer, both matrices seeded: with B = 0, as PEFT begins, A has no gradient."""
    settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")
    adapted = get_peft_model(model, settings).train()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def micro_batch(store: TokenStore, packing: str) -> MicroBatch:
    return build_micro_batch(store, np.arange(len(store)), packing, 0, 2)


def target_states(model: torch.nn.Module, micro: MicroBatch) -> torch.Tensor:
    """[N, H] hidden states that predict the target tokens, a sample's behind each other."""
    states = decoder(model)(**micro.inputs, use_cache=False).last_hidden_state
    return states.reshape(-1, states.shape[-1])[micro.supervised]


def sample_losses(model: torch.nn.Module, micro: MicroBatch, store: TokenStore) -> torch.Tensor:
    """[samples] cross-entropy of each sample's own target, summed over its tokens."""
    token_losses = F.cross_entropy(
        lm_head(model)(target_states(model, micro)), micro.labels, reduction="none"
    )
    return torch.stack([losses.sum() for losses in token_losses.split(store.num_target.tolist())])


def losses_and_lora_gradients(family: str, packing: str, store: TokenStore):
    attention = "eager" if packing == "none" else ATTENTION_NAME
    model = with_lora(make_model(family, attention))
    losses = sample_losses(model, micro_batch(store, packing), store)
    # Every sample weighs something else, so that a gradient that reaches the wrong sample is seen.
    (losses * torch.linspace(0.5, 2.0, len(losses))).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    return losses.detach(), {name: parameter.grad for name, parameter in trained.items()}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    "family, seed",
    [(family, seed) for family in FAMILIES for seed in range(MANY_SEEDS if family in MANY else FEW_SEEDS)],
)
def test_merged_prefixes_give_each_sample_its_padded_loss_and_lora_its_gradients(family, seed):
    store = random_tree_store(seed)
    losses, gradients = losses_and_lora_gradients(family, "none", store)
    merged, merged_gradients = losses_and_lora_gradients(family, "prefix_tree", store)
    assert len(losses) == len(store) and float(losses.min()) > 0
    assert ((merged - losses).abs() <= 1e-5 * losses).all(), float(((merged - losses) / losses).abs().max())
    assert set(merged_gradients) == set(gradients)
    for name, wanted in gradients.items():
        assert wanted.norm() > 0, name
        assert (merged_gradients[name] - wanted).norm() <= 1e-5 * wanted.norm(), name


def losses_and_gradients_with_dropout(packing: str, store: TokenStore, shared: int):
    attention = "eager" if packing == "none" else ATTENTION_NAME
    model = with_lora(make_model("llama", attention), dropout=0.3)
    forwards = use_prefix_dropout(model)
    torch.rand(len(packing))  # what was drawn before does not matter
    micro = build_micro_batch(store, np.arange(len(store)), packing, shared, 2, entropy=17)
    forwards.begin(micro.keys)
    losses = sample_losses(model, micro, store)
    (losses * torch.linspace(0.5, 2.0, len(losses))).sum().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("packing", ["packed", "shared_prefix", "prefix_tree"])
def test_with_dropout_every_packing_gives_the_losses_and_gradients_of_padded_samples(packing):
    store = store_with_a_head()
    losses, gradients = losses_and_gradients_with_dropout("none", store, 0)
    found, found_gradients = losses_and_gradients_with_dropout(packing, store, HEAD)
    assert ((found - losses).abs() <= 1e-5 * losses).all(), float(((found - losses) / losses).abs().max())
    for name, wanted in gradients.items():
        assert (found_gradients[name] - wanted).norm() <= 1e-5 * wanted.norm(), name
    plain = sample_losses(
        with_lora(make_model("llama", "eager")), build_micro_batch(store, np.arange(5), "none", 0, 2), store
    )
    assert ((found - plain).abs() > 1e-3 * plain).all(), "the masks do something"


HEAD = 6


def store_with_a_head() -> TokenStore:
    """Five samples whose prompts grow from a common start of more than HEAD tokens."""
    rng = np.random.default_rng(4)
    items = rng.integers(3, 120, 16)
    rows = [np.concatenate([items[:length], rng.integers(3, 120, 3)]) for length in (8, 9, 10, 12, 16)]
    return store_of(rows, np.full(5, 3, np.int32))


@pytest.mark.parametrize("seed", range(5))
def test_tokens_of_a_tree_have_one_key_for_all_samples_and_different_tokens_different_keys(seed):
    store = random_tree_store(seed)
    padded = build_micro_batch(store, np.arange(len(store)), "none", 0, 2, entropy=3)
    merged = build_micro_batch(store, np.arange(len(store)), "prefix_tree", 0, 2, entropy=3)
    rows = [store.row(sample)[:-1] for sample in range(len(store))]
    tree = merge_prefixes(rows)
    for number, (row, path) in enumerate(zip(rows, tree.paths, strict=True)):
        assert torch.equal(merged.keys[0, torch.from_numpy(path)], padded.keys[number, : len(row)])
    assert len(np.unique(merged.keys.numpy())) == len(tree.tokens)
