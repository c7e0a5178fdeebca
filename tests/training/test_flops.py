"""The operations per token behind the MFU that training shows."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from gdrt_ds.training.flops import training_flops_per_token

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
WEIGHTS = 2 * (
    4 * 16 * 16 + 3 * 16 * 32
)  # per layer: four square projections, three of the feed-forward part


def test_a_frozen_base_costs_two_products_per_weight_and_a_trained_one_three():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    assert training_flops_per_token(model) == 3 * 2 * WEIGHTS
    model.requires_grad_(False)
    assert training_flops_per_token(model) == 2 * 2 * WEIGHTS
