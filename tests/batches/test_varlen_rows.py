"""flash-attn's variable-length call on packed rows: what it is given, and that this is the same attention.

flash-attn runs on GPUs only. Here the plain-torch reference with the signature of its call takes its place,
so everything before and after the kernel is tested; the kernel itself is tested by `make gpu-check`.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
import transformers

from gdrt_ds.batches import build_micro_batch
from gdrt_ds.batches.tree_attention import TreeLayout, tree_mask
from gdrt_ds.batches.varlen_rows import (
    FLASH_2,
    cumulative_lengths,
    flash_call,
    varlen_reference,
    varlen_rows,
)
from gdrt_ds.errors import UserError
from gdrt_ds.models.families import decoder
from tests.batches.test_tree_attention import hidden_and_gradients, make_model, make_store

SCALE = 0.3


def row(layout: TreeLayout):
    generator = torch.Generator().manual_seed(2)
    total = len(layout.end)
    return [
        torch.randn(1, heads, total, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]


def whole_matrix(query, key, value, layout, window):
    mask = tree_mask(layout.end, positions=layout.positions, window=window)
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3)) * SCALE
    output = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    return output.transpose(1, 2)


def test_cumulative_lengths_say_where_each_sample_begins_and_the_last_ends():
    stops, longest = cumulative_lengths(TreeLayout.build([3, 5, 2]))
    assert stops.tolist() == [0, 3, 8, 10]
    assert stops.dtype == torch.int32
    assert longest == 5


def test_a_shared_prompt_prefix_cannot_be_said_in_lengths():
    with pytest.raises(ValueError, match="cannot share a prompt prefix"):
        cumulative_lengths(TreeLayout.build([3, 5], 4))


@pytest.mark.parametrize("window", [None, 4, 1])
def test_the_call_gives_the_attention_and_gradients_of_the_whole_matrix(window):
    layout = TreeLayout.build([5, 1, 7])
    found, wanted = row(layout), row(layout)
    output = varlen_rows(*found, layout, SCALE, 0.0, window, varlen_reference)
    expected = whole_matrix(*wanted, layout, window)
    assert torch.allclose(output, expected, atol=1e-12)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)


@pytest.mark.parametrize("mistake", ["stops", "window"])
def test_a_wrong_length_or_window_would_be_seen(mistake):
    layout = TreeLayout.build([5, 1, 7])
    parts = row(layout)

    def wrong(query, key, value, stops, *others, **options):
        if mistake == "stops":
            stops = stops + torch.tensor([0, 1, 0, 0], dtype=torch.int32)
            return varlen_reference(query, key, value, stops, stops, 7, 7, **options)
        left, right = options.pop("window_size")
        return varlen_reference(query, key, value, stops, *others, window_size=(left + 1, right), **options)

    expected = whole_matrix(*parts, layout, 4)
    assert not torch.allclose(varlen_rows(*parts, layout, SCALE, 0.0, 4, wrong), expected, atol=1e-3)


@pytest.fixture
def flash_attn(monkeypatch):
    """A package flash_attn whose kernel is the reference; it counts its calls."""
    package = types.ModuleType("flash_attn")
    package.calls = 0

    def flash_attn_varlen_func(*args, **options):
        package.calls += 1
        return varlen_reference(*args, **options)

    package.flash_attn_varlen_func = flash_attn_varlen_func
    flash_call.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    yield package
    flash_call.cache_clear()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_packed_rows_of_a_model_go_through_the_call_and_give_the_padded_states(family, flash_attn):
    hidden, gradients = hidden_and_gradients(make_model(family, "eager"), "none")
    packed, packed_gradients = hidden_and_gradients(make_model(family, FLASH_2), "packed")
    assert flash_attn.calls == 2  # layers
    assert torch.allclose(packed, hidden, atol=2e-5)
    for name, wanted in gradients.items():
        assert (packed_gradients[name] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6, name


def test_padded_rows_of_the_same_model_do_not_need_the_package(flash_attn):
    model = make_model("llama", FLASH_2)
    micro = build_micro_batch(make_store(), np.arange(4), "none", 4, 2)
    states = decoder(model)(**micro.inputs, use_cache=False).last_hidden_state
    assert torch.isfinite(states).all()
    assert flash_attn.calls == 0
    assert isinstance(model, transformers.PreTrainedModel)


def test_a_package_that_does_not_load_is_named(monkeypatch):
    flash_call.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match="flash_attn cannot be imported") as error:
        flash_call("flash_attn")
    assert "model.attention=sdpa" in error.value.fix
