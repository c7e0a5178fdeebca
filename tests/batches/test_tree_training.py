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
from tests.batches.test_tree_attention import FAMILIES, make_model, random_tree_store, store_of


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
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", list(FAMILIES))
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


def lora_dropouts(model: torch.nn.Module) -> dict[str, torch.nn.Dropout]:
    return {
        name: module
        for name, module in model.named_modules()
        if "lora_dropout" in name and isinstance(module, torch.nn.Dropout)
    }


def growing_samples() -> tuple[TokenStore, int]:
    """Five samples whose prompts grow from a common start, all their tokens targets; what they share."""
    rng = np.random.default_rng(4)
    items, shared = rng.integers(3, 120, 16), 6
    rows = [np.concatenate([items[:length], rng.integers(3, 120, 3)]) for length in (6, 8, 10, 12, 16)]
    # Every position but the last of a row predicts a target, so its hidden state can be looked at.
    return store_of(rows, np.array([len(row) - 1 for row in rows], np.int32)), shared


@pytest.mark.parametrize("packing", ["prefix_tree", "packed"])
def test_samples_have_one_dropout_mask_at_the_tokens_that_they_share_in_a_tree_and_their_own_elsewhere(
    packing,
):
    store, shared = growing_samples()
    model = with_lora(make_model("llama", ATTENTION_NAME), dropout=0.5)
    torch.manual_seed(0)
    with torch.no_grad():
        states = target_states(model, micro_batch(store, packing))
        of_sample = states.split(store.num_target.tolist())
    for earlier, later in zip(of_sample, of_sample[1:]):
        same = (earlier[:shared] == later[:shared]).all(1)
        if packing == "prefix_tree":
            assert same.all(), "a shared token is computed once, so all its samples have one row"
        else:
            assert not same.any(), "every sample has its own copy of a token, with a mask of its own"


def test_a_tree_with_dropout_is_the_padded_samples_with_the_masks_of_the_tree():
    """Each sample's loss is that of the sample alone, where a shared token's mask is that of the others."""
    store = random_tree_store(0)
    tree = merge_prefixes([store.row(sample)[:-1] for sample in range(len(store))])
    model = with_lora(make_model("llama", ATTENTION_NAME), dropout=0.5)
    masks = {}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: masks.update({name: (output[0] != 0) / (1 - module.p)})
        )
        for name, module in lora_dropouts(model).items()
    ]
    torch.manual_seed(0)
    merged = sample_losses(model, micro_batch(store, "prefix_tree"), store)
    for hook in hooks:
        hook.remove()
    assert len(masks) == 14 and all(0.4 < float((mask > 0).float().mean()) < 0.6 for mask in masks.values())

    padded = with_lora(make_model("llama", "eager"), dropout=0.5)
    torch.manual_seed(0)
    own = sample_losses(padded, micro_batch(store, "none"), store)
    for name, module in lora_dropouts(padded).items():

        def with_mask_of_the_tree(module, inputs, output, mask=masks[name]):
            spread = torch.zeros_like(inputs[0])
            for row, path in enumerate(tree.paths):
                spread[row, : len(path)] = mask[torch.from_numpy(path)]
            return inputs[0] * spread

        module.register_forward_hook(with_mask_of_the_tree)
    alone = sample_losses(padded, micro_batch(store, "none"), store)
    assert ((merged - alone).abs() <= 1e-5 * alone).all(), float(((merged - alone) / alone).abs().max())
    assert ((own - alone).abs() > 1e-3 * alone).all(), (
        "masks of its own give another loss: it is masks we see"
    )
