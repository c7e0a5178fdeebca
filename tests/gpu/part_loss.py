"""The fused loss on the device: the Triton kernels against the reference, with the checks of tests/loss."""

from __future__ import annotations

import torch

from gdrt_ds.loss import describe, group_cross_entropy
from tests.gpu.rows import Row, Spot, passes, same
from tests.loss.cases import Case, check_no_worse_than_plain, check_top_k

SETTINGS = {
    "plain": {},
    "trained head": {"train": True},
    "bias, soft-cap, scale": {"bias": True, "softcap": 2.0, "logit_scale": 0.3, "temperature": 1.7},
    "LoRA on the head": {"lora": True},
    "allowed tokens": {"allowed": True},
    "everything trained": {"train": True, "bias": True, "lora": True, "softcap": 3.0},
}


def run(spot: Spot) -> list[Row]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, settings in SETTINGS.items():
            what = f"{name}, {str(dtype).removeprefix('torch.')}: as near to float64 as plain torch"
            case = dict(n=37, v=101) if spot.dry else dict(n=300, v=5003, h=128)
            options = {**case, **settings, "device": spot.device}
            rows.append(passes(what, check_no_worse_than_plain, group_cross_entropy, dtype, **options))
            what = f"{name}, {str(dtype).removeprefix('torch.')}: K-th log-probability of a full sort"
            tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
            rows.append(passes(what, check_top_k, group_cross_entropy, dtype, tolerance, **options))
    case = Case(n=64, v=3001, h=64, device=spot.device)
    first = case.run(group_cross_entropy)
    again = case.run(group_cross_entropy)
    equal = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    rows.append(same("two calls are bitwise equal", equal, True))
    line = describe(spot.device.type, torch.bfloat16)
    wanted = "torch" if spot.dry else "triton"
    rows.append(Row("implementation that auto takes", line, wanted, wanted in line.split(";")[0]))
    return rows
