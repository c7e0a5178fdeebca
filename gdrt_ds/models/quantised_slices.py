"""Which values of a packed weight a rank quantises, and how: the arithmetic of sharded_loading.py.

NF4 is block-wise: the packed bytes and the scale of a block of 64 values do not depend on the others. So a
rank quantises the blocks that cover its slice, and the scales of all ranks are joined in order.

Notation: a packed weight has S storage elements of `item` bytes, and a byte holds two values. Rank r owns the
elements [r * size, (r + 1) * size).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gdrt_ds.models.quantization.nf4 import BLOCK, NESTED_BLOCK

QUANT_TYPE = "nf4"
PIECE = 4096 * BLOCK
"""Values read and quantised at once on a CPU, where bitsandbytes works with about 20 bytes per value."""


def partition_range(numel: int, rank: int, world: int) -> tuple[int, int, int]:
    """Returns (size, first, end) of a rank's elements in a flat tensor of `numel`.

    The last ranks may own fewer than `size`.
    """
    size = -(-numel // world)
    return size, min(rank * size, numel), min((rank + 1) * size, numel)


def block_range(first: int, end: int, numel: int) -> tuple[int, int]:
    """Returns the range of values, widened to whole quantisation blocks."""
    return first // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, numel)


@dataclass(frozen=True)
class Packed:
    """How the packed weight of one 4-bit layer is divided over the ranks.

    Attributes:
        numel: values of the weight.
        item: bytes of one storage element.
        size: storage elements of a rank's slice.
        rank, world: this rank, and how many there are.
    """

    numel: int
    item: int
    size: int
    rank: int
    world: int

    @property
    def bytes(self) -> int:
        """Packed bytes of the whole weight: two values each."""
        return (self.numel + 1) // 2

    @property
    def own_bytes(self) -> tuple[int, int]:
        """First and end of this rank's packed bytes."""
        first = self.rank * self.size * self.item
        return min(first, self.bytes), min(first + self.size * self.item, self.bytes)

    @property
    def own_values(self) -> tuple[int, int]:
        """First and end of the values in this rank's packed bytes."""
        first, end = self.own_bytes
        return first * 2, min(end * 2, self.numel)

    def owned_blocks(self, rank: int) -> tuple[int, int]:
        """First and end of a rank's blocks (see `owned_blocks`)."""
        return owned_blocks(self.numel, self.bytes, self.item, self.size, rank)


def quantize_range(
    read: Callable[[int, int], Tensor], low: int, high: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns `quantize_blocks` of the values [low, high) that `read(start, stop)` gives.

    On a CPU they are taken in pieces. An empty range gives empty tensors.
    """
    step = max(1, high - low) if device.type == "cuda" else PIECE
    packed = [torch.empty(0, dtype=torch.uint8, device=device)]
    absmax = [torch.empty(0, device=device)]
    for start in range(low, high, step):
        values = read(start, min(start + step, high)).to(dtype).to(device)
        piece, scales = quantize_blocks(values)
        packed.append(piece)
        absmax.append(scales)
    return torch.cat(packed), torch.cat(absmax)


def quantize_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns packed uint8[n / 2] and the scales float32[blocks] of whole blocks of a flat tensor."""
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(values, BLOCK, QUANT_TYPE, torch.uint8)
    return packed.view(-1), absmax.view(-1)


def quant_state_of(
    absmax: Tensor, shape: torch.Size, double_quant: bool, dtype: torch.dtype, device: torch.device
):
    """Returns bitsandbytes' description of a packed weight.

    Args:
        absmax: float32 scales of all its blocks, in order.
        shape: [out, in] of the weight.
        double_quant: whether the scales are quantised too.
        dtype: dtype of the computation.
        device: where the tables go.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    offset = None
    state2 = None
    if double_quant:
        offset = absmax.mean()
        absmax, state2 = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return QuantState(
        absmax=absmax,
        shape=shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=get_4bit_type(QUANT_TYPE, device=device),
        quant_type=QUANT_TYPE,
        offset=offset,
        state2=state2,
    )


def dequantised_pieces(packed: Tensor, state) -> Iterator[Tensor]:
    """Yields the values of a packed weight in order, flat and in `state.dtype`, some blocks at a time.

    They are those that its layer computes with. Where a row is not made of whole blocks, they come at once:
    there bitsandbytes' CPU kernel (0.50.2) finds the block of a value by its row, and what it gives depends
    on the shape.

    Args:
        packed: uint8, flat.
        state: its quant_state.
    """
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    if state.shape[-1] % state.blocksize:
        yield dequantize_4bit(packed.view(-1, 1), state).reshape(-1)
        return
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2)
        absmax += state.offset
    absmax = absmax.float().view(-1)
    numel = state.shape.numel()
    step = PIECE // state.blocksize * state.blocksize
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        part = copy.copy(state)
        part.absmax = absmax[start // state.blocksize : -(-stop // state.blocksize)].contiguous()
        part.shape = torch.Size((1, stop - start))
        part.nested = False
        yield dequantize_4bit(packed[start // 2 : (stop + 1) // 2].view(-1, 1), part).view(-1)


def owned_blocks(numel: int, packed_bytes: int, item: int, size: int, rank: int) -> tuple[int, int]:
    """Returns first and end of the blocks whose first value lies in the rank's slice: each has one owner.

    Args:
        numel: values of the weight.
        packed_bytes: its packed bytes.
        item: bytes of one storage element.
        size: storage elements of a rank's slice.
        rank: the rank.
    """
    total = -(-numel // BLOCK)
    first, end = (min(r * size * item, packed_bytes) * 2 for r in (rank, rank + 1))
    return min(-(-first // BLOCK), total), min(-(-end // BLOCK), total)


def gather_absmax(absmax: Tensor, first_block: int, layout: Packed) -> Tensor:
    """Returns float32[blocks of the whole weight], the same on every rank: the ranks' own blocks in order.

    Args:
        absmax: scales of the blocks that this rank quantised, the first of which is block `first_block`.
        first_block: see above; a rank may have quantised one block more than it owns at either end.
        layout: how the weight is divided.
    """
    if layout.world == 1:
        return absmax
    ranges = [layout.owned_blocks(rank) for rank in range(layout.world)]
    low, high = ranges[layout.rank]
    width = max(end - start for start, end in ranges)
    mine = absmax.new_zeros(width)
    mine[: high - low].copy_(absmax[low - first_block : high - first_block])
    parts = [torch.empty_like(mine) for _ in range(layout.world)]
    dist.all_gather(parts, mine)
    return torch.cat([part[: end - start] for part, (start, end) in zip(parts, ranges, strict=True)])
