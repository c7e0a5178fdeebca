"""The own 4-bit layer on the device: bitwise bitsandbytes' forward, and its gradient."""

from __future__ import annotations

import torch

from tests.gpu.rows import Row, Spot, at_most, same
from tests.models.test_four_bit import gradient_of, own, quantised


def run(spot: Spot) -> list[Row]:
    rows = []
    shapes = [(128, 96, 21)] if spot.dry else [(4096, 14336, 512), (4096, 1024, 1), (192, 320, 33)]
    dtypes = [torch.float32] if spot.dry else [torch.bfloat16, torch.float16]
    for inputs, outputs, tokens in shapes:
        for dtype in dtypes:
            for storage in (torch.uint8, torch.bfloat16):
                layer = quantised(inputs, outputs, dtype=dtype, storage=storage, device=spot.device)
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(tokens, inputs, generator=generator).to(spot.device, dtype)
                d_y = torch.randn(tokens, outputs, generator=generator).to(spot.device, dtype)
                expected_y, expected_d_x = gradient_of(layer, x, d_y)
                y, d_x = gradient_of(own(layer), x, d_y)
                what = f"{tokens} x {inputs} -> {outputs}, {dtype}, stored in {storage}".replace("torch.", "")
                rows.append(same(f"{what}: output bitwise bitsandbytes'", torch.equal(y, expected_y), True))
                error = float((d_x - expected_d_x).double().norm() / expected_d_x.double().norm())
                rows.append(at_most(f"{what}: gradient against bitsandbytes'", error, 1e-2))
    return rows
