"""The own 4-bit linear layer: bitsandbytes' numbers, without the weight that bitsandbytes keeps alive."""

from __future__ import annotations

import itertools

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from gdrt_ds.models.four_bit import (
    FourBitLinear,
    FourBitProduct,
    WeightNotGathered,
    columns_at_once,
    input_gradient,
    use_four_bit_linear,
)

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def quantised(
    inputs=128, outputs=96, bias=False, dtype=torch.float32, storage=torch.uint8, double=True, device="cpu"
):
    """One of bitsandbytes' layers with random weights, quantised here."""
    torch.manual_seed(1)
    layer = Linear4bit(
        inputs,
        outputs,
        bias=bias,
        compute_dtype=dtype,
        compress_statistics=double,
        quant_type="nf4",
        quant_storage=storage,
    )
    weight = torch.randn(outputs, inputs).to(dtype)
    layer.weight = Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=double,
        quant_type="nf4",
        quant_storage=storage,
        module=layer,
    )
    layer = layer.to(device)
    layer.support_avx512bf16_for_cpu = False
    if bias:
        layer.bias = nn.Parameter(torch.randn(outputs).to(dtype), requires_grad=False)
    return layer


def own(layer: Linear4bit) -> FourBitLinear:
    """The same weights behind the own layer."""
    other = FourBitLinear.__new__(FourBitLinear)
    other.__dict__ = dict(layer.__dict__)
    return other


def gradient_of(layer, x, d_y):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(d_y)
    return y.detach(), x.grad


CASES = list(itertools.product([torch.float32, torch.bfloat16], STORAGES, [False, True], [False, True]))


@pytest.mark.parametrize("dtype, storage, bias, double", CASES)
def test_output_and_gradient_are_bitwise_those_of_bitsandbytes(dtype, storage, bias, double):
    layer = quantised(bias=bias, dtype=dtype, storage=storage, double=double)
    x = torch.randn(3, 7, 128, dtype=dtype)
    d_y = torch.randn(3, 7, 96, dtype=dtype)
    expected_y, expected_d_x = gradient_of(layer, x, d_y)
    y, d_x = gradient_of(own(layer), x, d_y)
    assert torch.equal(y, expected_y)
    assert torch.equal(d_x, expected_d_x)


@pytest.mark.parametrize("inputs, outputs", [(40, 56), (128, 128), (64, 2), (192, 320)])
def test_shapes_of_all_kinds_are_bitwise_equal(inputs, outputs):
    layer = quantised(inputs, outputs)
    x = torch.randn(5, inputs)
    d_y = torch.randn(5, outputs)
    for found, expected in zip(gradient_of(own(layer), x, d_y), gradient_of(layer, x, d_y), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
def test_a_gradient_made_in_blocks_is_as_near_to_float64_as_the_whole(dtype, double):
    layer = quantised(256, 160, dtype=dtype, double=double)
    state = layer.weight.quant_state
    d_y = torch.randn(50, 160, dtype=dtype)
    values = dequantize_4bit(layer.weight.data, state)
    exact = d_y.double() @ values.double()
    whole = input_gradient(d_y, layer.weight, state, most_bytes=1 << 30)
    small = 64 * 160 * d_y.element_size()
    assert columns_at_once(state, d_y.element_size(), small) == 64
    blocks = input_gradient(d_y, layer.weight, state, most_bytes=small)

    def error(found):
        return float((found.double() - exact).norm())

    assert error(blocks) <= error(whole) * 1.01 + 1e-12
    assert error(blocks) > 0


def test_the_values_of_blocks_are_bitwise_those_of_the_whole_weight():
    layer = quantised(256, 160)
    state = layer.weight.quant_state
    identity = torch.eye(160)
    blocks = input_gradient(identity, layer.weight, state, most_bytes=1)
    assert torch.equal(blocks, dequantize_4bit(layer.weight.data, state))


def test_rows_that_are_not_whole_blocks_are_taken_at_once():
    state = quantised(40, 56).weight.quant_state
    assert columns_at_once(state, 4, 1) == 40


def held_after_forward(layer) -> bool:
    """Whether the packed bytes live on when the parameter's data are replaced, as ZeRO-3 does it."""
    x = torch.randn(4, 128, requires_grad=True)
    held = StorageWeakRef(layer.weight.data.untyped_storage())
    packed = layer.weight.data.clone()
    y = layer(x)
    layer.weight.data = torch.empty(0, dtype=torch.uint8)
    alive = not held.expired()
    layer.weight.data = packed  # what the hook does before the backward
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    return alive


def test_nothing_holds_the_weight_between_forward_and_backward():
    assert held_after_forward(own(quantised())) is False
    assert held_after_forward(quantised()) is True, "bitsandbytes no longer keeps it: the own layer can go"


def test_a_weight_that_was_not_gathered_again_is_an_error_by_name():
    layer = own(quantised())
    x = torch.randn(4, 128, requires_grad=True)
    y = layer(x)
    layer.weight.data = torch.empty(0, dtype=torch.uint8)
    with pytest.raises(WeightNotGathered, match=r"\[96, 128\] has 0 of 6144 bytes in the backward"):
        y.sum().backward()


def test_no_tokens_give_no_rows_and_a_gradient_of_that_shape():
    layer = own(quantised())
    x = torch.empty(0, 128, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 96)
    assert x.grad.shape == (0, 128)


def test_without_gradient_the_layer_is_bitsandbytes_own():
    layer = quantised()
    x = torch.randn(4, 128)
    assert torch.equal(own(layer)(x), layer(x))
    assert own(layer)(x).grad_fn is None


def test_a_trained_bias_gets_the_sum_over_all_tokens():
    layer = own(quantised(bias=True))
    layer.bias.requires_grad_()
    x = torch.randn(3, 5, 128)
    y = layer(x)
    d_y = torch.randn_like(y)
    y.backward(d_y)
    torch.testing.assert_close(layer.bias.grad, d_y.sum((0, 1)))


def test_recomputed_activations_give_the_same_gradient():
    from torch.utils.checkpoint import checkpoint

    layer = own(quantised(128, 128))
    block = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(4, 128)
    _, expected = gradient_of(block, x, torch.ones(4, 128))
    again = x.clone().requires_grad_()
    checkpoint(block, again, use_reentrant=False).backward(torch.ones(4, 128))
    assert torch.equal(again.grad, expected)


def test_a_model_changes_its_layers_in_place_and_peft_still_knows_them():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    model = nn.Module()
    model.q_proj = quantised(128, 96)
    model.is_loaded_in_4bit = True
    weight = model.q_proj.weight
    assert use_four_bit_linear(model) == 1
    assert use_four_bit_linear(model) == 0
    assert isinstance(model.q_proj, FourBitLinear)
    assert model.q_proj.weight is weight
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    assert isinstance(adapted.q_proj, LoraLinear4bit)
    adapted.q_proj(torch.randn(2, 128)).sum().backward()
    assert adapted.q_proj.lora_B["default"].weight.grad.abs().sum() > 0


def test_the_function_keeps_nothing_as_a_saved_tensor():
    layer = own(quantised())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        FourBitProduct.apply(
            torch.randn(4, 128, requires_grad=True), layer.weight, None, layer.weight.quant_state
        )
    assert saved == []
