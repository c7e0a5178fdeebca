"""A whole step with its backward on the meta device: nothing asks for a value but the flags of the step.

Tensors there have no data on any device, so a host synchronisation of any kind raises. The engine, its
collectives and the optimizer are left out; see setting.py. On a fake GPU, the same code is run without
gradients (test_fake_cuda.py).
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from gdrt_ds.dro import StepBuffer
from gdrt_ds.loss import implementations
from tests.cuda_dry.setting import OBJECTIVES, make_step, run_step
from tests.distributed.exact_cells import NUM_GROUPS

READ = "meta tensor"
"""In every error of torch about a value that is not there."""


@pytest.fixture(autouse=True)
def what_meta_lacks(monkeypatch):
    """torch has no autocast for it, which the loss switches off around its products; Triton has no data."""
    usual = torch.autocast

    def autocast(kind, **options):
        return contextlib.nullcontext() if kind == "meta" else usual(kind, **options)

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(implementations, "_triton_problem", lambda *place: "tensors have no data here")


@pytest.fixture
def flags_are_known(monkeypatch):
    """The one read of a step, answered: no rank saw NaN and none was asked to stop."""
    monkeypatch.setattr(StepBuffer, "flags", lambda self: (False, False))


def gradients_of(runner) -> list[torch.Tensor]:
    return [parameter.grad for parameter in runner.engine.module.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_and_its_backward_read_nothing_but_the_flags(objective, flags_are_known):
    runner = make_step("meta", objective, "shared_prefix", "gdrt_tree")
    result = run_step(runner)
    gradients = gradients_of(runner)
    assert len(gradients) == len(list(runner.engine.module.parameters()))
    assert all(gradient.is_meta for gradient in gradients)
    assert result.group_loss.is_meta
    assert result.group_weight.shape == (NUM_GROUPS,)


@pytest.mark.parametrize("packing, attention", [("packed", "gdrt_tree"), ("none", "eager")])
def test_rows_of_every_packing_do_so(packing, attention, flags_are_known):
    runner = make_step("meta", "gdrt", packing, attention)
    run_step(runner)
    assert gradients_of(runner)


def test_padded_rows_on_sdpa_are_read_by_transformers_itself(flags_are_known):
    """It asks the mask whether anything is padded. On a fake GPU it does not: it takes that for tracing."""
    with pytest.raises(RuntimeError, match=READ) as failed:
        run_step(make_step("meta", "gdrt", "none", "sdpa"))
    assert any("masking_utils" in str(entry.path) for entry in failed.traceback)


def test_the_flags_themselves_are_a_read():
    with pytest.raises((RuntimeError, NotImplementedError), match=READ):
        run_step(make_step("meta", "gdrt", "shared_prefix", "gdrt_tree"))


def in_the_loss(runner) -> None:
    """A read in the forward of the fused loss."""
    head = runner.engine.module._head[0]
    usual = head.forward

    def forward(hidden, request):
        bool(hidden.isfinite().all())
        return usual(hidden, request)

    head.forward = forward


def in_the_weights(runner) -> None:
    """A read between the forward and the backward."""
    usual = runner._late_weights

    def weights(losses, facts, buffer):
        float(losses.max())
        return usual(losses, facts, buffer)

    runner._late_weights = weights


def in_the_backward(runner) -> None:
    """A read while gradients are made."""
    weight = next(runner.engine.module.parameters())
    weight.register_hook(lambda gradient: gradient.norm().tolist() and None)


@pytest.mark.parametrize("plant", [in_the_loss, in_the_weights, in_the_backward])
def test_a_planted_read_fails_wherever_it_stands(plant, flags_are_known):
    runner = make_step("meta", "gdrt", "shared_prefix", "gdrt_tree")
    plant(runner)
    with pytest.raises((RuntimeError, NotImplementedError), match=READ):
        run_step(runner)
