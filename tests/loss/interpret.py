"""Runs the Triton kernels in Triton's interpreter beside the reference: TRITON_INTERPRET=1 python
tests/loss/interpret.py

One JSON object per check, result "ok" or what failed. Run by test_kernels.py in a process of its own.
Sizes are small because the interpreter runs one program at a time in Python.
"""

import json
import traceback

import torch

from gdrt_ds.errors import UserError
from gdrt_ds.loss import group_cross_entropy, kernels
from tests.loss.cases import (
    Case,
    check_no_worse_than_plain,
    check_sums_are_sums_of_token_losses,
    check_top_k,
)


def fused(*arguments, chunk_bytes=None, **settings):
    return group_cross_entropy(*arguments, implementation="triton", chunk_bytes=chunk_bytes, **settings)


def dtype_is_no_worse(dtype) -> None:
    for settings in (
        {},
        {"bias": True},
        {"softcap": 2.0, "logit_scale": 0.3, "temperature": 1.7},
        {"lora": True},
    ):
        check_no_worse_than_plain(fused, dtype, n=24, **settings)


def trained_heads() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_no_worse_than_plain(fused, dtype, n=24, train=True)
        check_no_worse_than_plain(
            fused,
            dtype,
            n=24,
            train=True,
            bias=True,
            lora=True,
            softcap=3.0,
            logit_scale=0.7,
            temperature=1.3,
        )


def odd_vocabularies() -> None:
    def small(*a, **k):
        return fused(*a, chunk_bytes=4_000, **k)

    for v in (1, 2, 127, 129, kernels.COLUMN_BLOCK + 3):
        check_no_worse_than_plain(small, torch.float32, n=5, v=v)
        check_no_worse_than_plain(small, torch.float32, n=5, v=v, train=True)


def extreme_logits() -> None:
    for train in (False, True):
        check_no_worse_than_plain(fused, torch.float32, n=16, size=1e4, train=train)
    case = Case(n=8, v=200, bias=True)
    with torch.no_grad():
        case.settings["bias"][:100] = -torch.inf
    case.labels = case.labels % 100 + 100
    for frozen in (True, False):
        assert all(torch.isfinite(t).all() for t in case.run(fused, chunk_bytes=2_000, frozen_weight=frozen))


def allowed_tokens() -> None:
    for settings in (
        {},
        {"softcap": 2.0, "temperature": 0.7},
        {"softcap": 2.0, "train": True, "bias": True, "lora": True},
    ):
        check_no_worse_than_plain(fused, torch.float32, n=24, allowed=True, **settings)


def top_k() -> None:
    capped = {"softcap": 2.0, "temperature": 0.7, "logit_scale": 0.3}
    for settings in ({}, {"train": True}, capped, {"train": True, **capped}, {"allowed": True, **capped}):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
            check_top_k(lambda *a, **k: fused(*a, chunk_bytes=3_000, **k), dtype, tolerance, n=12, **settings)


def no_tokens() -> None:
    for train in (False, True):
        sums, losses, *gradients = Case(n=0, train=train).run(fused)
        assert sums.tolist() == [0.0] * 5 and len(losses) == 0 and all(g.abs().sum() == 0 for g in gradients)


def repeatable() -> None:
    for train in (False, True):
        case = Case(n=24, train=train)
        assert all(torch.equal(a, b) for a, b in zip(case.run(fused), case.run(fused)))


def many_group_sums() -> None:
    make = torch.Generator().manual_seed(3)
    losses, groups = torch.rand(5000, generator=make) * 12, torch.randint(7, (5000,), generator=make)
    truth = torch.zeros(8, dtype=torch.float64).index_add_(0, groups, losses.double())
    assert (kernels.TritonRowwise.group_sums(losses, groups, 8) - truth).abs().max() < 1e-7 * truth.max()


def planted_error() -> None:
    """A kernel that scales the gradient twice (as when the head's product applies the gain, too) must fail
    the same check.
    """
    original = kernels.TritonRowwise.finish_rows_

    def wrong(self, *arguments):
        self.slope = self.slope * 1.01
        return original(self, *arguments)

    kernels.TritonRowwise.finish_rows_ = wrong
    try:
        check_no_worse_than_plain(fused, torch.float32, n=12)
    except AssertionError:
        return
    finally:
        kernels.TritonRowwise.finish_rows_ = original
    raise AssertionError("a gradient that is 1 % too long passed")


def float64_is_refused() -> None:
    try:
        Case(n=2, dtype=torch.float64).run(fused)
    except UserError as error:
        assert "float64" in str(error)
        return
    raise AssertionError("a float64 head was accepted")


CHECKS = {
    "float32 is no worse than plain": lambda: dtype_is_no_worse(torch.float32),
    "bfloat16 is no worse than plain": lambda: dtype_is_no_worse(torch.bfloat16),
    "trained heads": trained_heads,
    "odd vocabularies and chunks": odd_vocabularies,
    "extreme logits": extreme_logits,
    "allowed tokens with soft-cap": allowed_tokens,
    "sums are sums of token losses": lambda: check_sums_are_sums_of_token_losses(fused),
    "K-th log-probability": top_k,
    "no tokens": no_tokens,
    "bitwise repeatable": repeatable,
    "group sums of many tokens": many_group_sums,
    "a planted error in the kernel is found": planted_error,
    "float64 is refused": float64_is_refused,
}

if __name__ == "__main__":
    for name, check in CHECKS.items():
        try:
            check()
            result = "ok"
        except Exception:  # reported as this check's result, so that one failure does not hide the others
            result = traceback.format_exc()
        print(json.dumps({"check": name, "result": result}), flush=True)
