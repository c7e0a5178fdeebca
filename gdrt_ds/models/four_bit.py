"""The 4-bit linear layer whose weight ZeRO-3 can free between forward and backward.

bitsandbytes' own layer keeps a view of the gathered packed weight from the forward to the backward
(0.50.2, `MatMul4Bit`: `ctx.tensors = (None, B)`). DeepSpeed frees a weight by replacing `parameter.data`,
which does not free what a view still holds. So at the end of the forward every rank holds the whole packed
base, however many ranks there are. `FourBitLinear` keeps the Parameter itself instead, and reads its data
again in the backward, where DeepSpeed's hook has gathered it once more.

The forward is bitsandbytes' own product, bitwise. The backward multiplies by blocks of columns of the
dequantised weight, so that no whole copy of a large weight exists in the dtype of the computation. Every
element of the input's gradient is still one product over all rows: nothing is added up in a lower precision.

Shapes: M tokens, K input features, N output features. A packed byte holds two values.
"""

from __future__ import annotations

import copy

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import nn

DEQUANTISED_BYTES = 64 << 20
"""Most bytes of dequantised weight that the backward of one layer holds at once."""


class WeightNotGathered(RuntimeError):
    """The packed weight is not there in the backward: nothing gathered it after ZeRO-3 had freed it."""

    def __init__(self, shape: tuple[int, ...], found: int, wanted: int):
        super().__init__(
            f"the packed weight of a 4-bit layer {list(shape)} has {found} of {wanted} bytes in the "
            "backward: ZeRO-3 has freed it and did not gather it again\n"
            "  fix: call the layer as a module (its hooks gather the weight), not its function or its weight"
        )


class FourBitLinear(Linear4bit):
    """bitsandbytes' Linear4bit, apart from what it keeps for the backward (see the head of this file).

    PEFT, transformers and this package find it by isinstance of Linear4bit.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W^T + bias in the dtype of x.

        Args:
            x: [..., K].
        """
        fix_4bit_weight_quant_state_from_module(self)
        state = self.weight.quant_state
        bias = self.bias
        needs_grad = x.requires_grad or (bias is not None and bias.requires_grad)
        transposed = x.shape[-1] == state.shape[0] and state.shape[0] != state.shape[1]
        if not (torch.is_grad_enabled() and needs_grad) or transposed:
            return super().forward(x)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        dtype = x.dtype
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        if bias is not None:
            bias = bias.to(x.dtype)
        return FourBitProduct.apply(x, self.weight, bias, state).to(dtype)


class FourBitProduct(torch.autograd.Function):
    """x W^T + bias for a packed W; the backward needs W again and nothing else."""

    @staticmethod
    def forward(ctx, x, weight, bias, state):
        # An attribute, not a saved tensor: a saved tensor would keep the gathered data alive, and under
        # non-reentrant checkpointing it would be computed again.
        ctx.weight = weight
        ctx.state = state
        ctx.bias_dtype = None if bias is None else bias.dtype
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], state.shape[0])
        return packed_product(x, weight, bias, state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        d_x = None
        d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = input_gradient(gradient, ctx.weight, ctx.state)
        if ctx.needs_input_grad[2]:
            d_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        return d_x, None, d_bias, None


def packed_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state) -> torch.Tensor:
    """Returns bitsandbytes' own product of [..., K] with the packed weight: [..., N]."""
    nested = {}
    absmax = state.absmax
    if state.nested:
        nested = {
            "absmax_8bit": state.absmax,
            "absmax_code": state.state2.code,
            "absmax_offset": state.offset,
        }
        absmax = state.state2.absmax
    return torch.ops.bitsandbytes.gemm_4bit.default(
        x,
        weight.detach().view(-1, 1),
        state.shape,
        absmax,
        state.blocksize,
        state.quant_type,
        bias=bias,
        **nested,
    )


def input_gradient(
    gradient: torch.Tensor, weight: torch.Tensor, state, most_bytes: int | None = None
) -> torch.Tensor:
    """Returns gradient W: the gradient of the layer's input, [..., K].

    Args:
        gradient: of the layer's output, [..., N].
        weight: the packed weight, gathered.
        state: its quant_state.
        most_bytes: most bytes of dequantised weight alive at once; None = `DEQUANTISED_BYTES`. One block is
            bitwise what bitsandbytes computes.

    Raises:
        WeightNotGathered: the weight's data are not there.
    """
    rows, columns = state.shape
    packed = weight.detach().reshape(-1).view(torch.uint8)
    wanted = (rows * columns + 1) // 2
    if packed.numel() < wanted:
        raise WeightNotGathered(tuple(state.shape), packed.numel(), wanted)
    width = columns_at_once(state, gradient.element_size(), most_bytes)
    if width >= columns:
        whole = dequantize_4bit(packed.view(-1, 1), state).to(gradient.dtype)
        return torch.matmul(gradient, whole)
    d_x = gradient.new_empty(*gradient.shape[:-1], columns)
    for first, block in dequantised_columns(packed, state, width):
        block = block.to(gradient.dtype)
        d_x[..., first : first + block.shape[1]] = torch.matmul(gradient, block)
    return d_x


def columns_at_once(state, bytes_per_value: int, most_bytes: int | None = None) -> int:
    """Returns how many columns of a weight are dequantised at once: all, or some whole quantisation blocks.

    A weight whose rows are not made of whole blocks is taken at once, because a block would then lie in two
    rows.
    """
    rows, columns = state.shape
    budget = DEQUANTISED_BYTES if most_bytes is None else most_bytes
    if rows * columns * bytes_per_value <= budget or columns % state.blocksize:
        return columns
    blocks = max(1, budget // (rows * bytes_per_value * state.blocksize))
    return min(columns, blocks * state.blocksize)


def dequantised_columns(packed: torch.Tensor, state, width: int):
    """Yields (first column, values [N, width]) of a packed weight, bitwise those of the whole.

    Args:
        packed: uint8, flat, row by row.
        state: its quant_state; its rows are made of whole blocks.
        width: columns of a part, whole blocks.
    """
    rows, columns = state.shape
    absmax = state.absmax
    if state.nested:
        # As bitsandbytes does it; a sixty-fourth of the values, so it may be whole.
        absmax = dequantize_blockwise(state.absmax, state.state2)
        absmax += state.offset
    absmax = absmax.float().view(rows, columns // state.blocksize)
    packed = packed[: rows * columns // 2].view(rows, columns // 2)
    for first in range(0, columns, width):
        end = min(first + width, columns)
        bytes_here = packed[:, first // 2 : end // 2].contiguous()
        scales = absmax[:, first // state.blocksize : end // state.blocksize].contiguous()
        part = copy.copy(state)
        part.absmax = scales.view(-1)
        part.shape = torch.Size((rows, end - first))
        part.nested = False
        yield first, dequantize_4bit(bytes_here.view(-1, 1), part)


def use_four_bit_linear(model: nn.Module) -> int:
    """Turns bitsandbytes' 4-bit layers into `FourBitLinear`, in place; returns how many there were.

    The class changes and nothing else: parameters, quant_state, hooks and names stay.
    """
    changed = 0
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = FourBitLinear
            changed += 1
    return changed
