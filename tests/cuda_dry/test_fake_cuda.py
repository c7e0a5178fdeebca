"""Training and scoring on a GPU that holds no data: no tensor is left behind, and the host waits for none.

What the fake GPU can and cannot tell stands in fake_cuda.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
)

from gdrt_ds.batches import flex_rows
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.dro import StepBuffer
from gdrt_ds.inference.catalogue_scoring import CatalogueScorer
from gdrt_ds.inference.prompt_reader import PromptReader
from gdrt_ds.loss import implementations
from gdrt_ds.models.attention import tree_sdpa  # noqa: F401, registers its attention
from tests.cuda_dry.fake_cuda import CUDA, BlockingCopy, FakeCuda, MixedDtypes
from tests.cuda_dry.setting import OBJECTIVES, make_step, measure_step, tiny_llama

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-check")
ROWS = [
    ("none", "sdpa"),
    ("packed", "gdrt_tree"),
    ("shared_prefix", "gdrt_tree"),
    ("shared_prefix", "tree_sdpa"),
    ("prefix_tree", "gdrt_tree"),
]


@pytest.fixture(autouse=True)
def no_compilers(monkeypatch):
    """Triton and torch.compile would run on data: torch's own kernels and FlexAttention's shapes instead."""
    from torch._higher_order_ops.flex_attention import flex_attention as operator

    def uncompiled(query, key, value, block_mask, scale, enable_gqa):
        def same_score(score, batch, head, q, k):
            return score

        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
        return operator(query, key, value, same_score, block_mask.as_tuple(), scale, {})[0]

    monkeypatch.setattr(implementations, "_triton_problem", lambda *place: "tensors have no data here")
    monkeypatch.setattr(flex_rows, "compiled_flex", lambda: uncompiled)


def step_of(packing="shared_prefix", attention="gdrt_tree", objective="gdrt", dtype=torch.bfloat16):
    return make_step(CUDA, objective, packing, attention, dtype)


@pytest.mark.parametrize("packing, attention", ROWS)
def test_a_step_is_measured_on_the_device_without_a_read_or_a_wait(packing, attention):
    with FakeCuda() as cuda, torch.no_grad():
        runner = step_of(packing, attention)
        cuda.watch_copies()
        q = measure_step(runner)
    assert q.device == CUDA
    assert q.dtype == torch.float64


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_stays_on_the_device(objective):
    with FakeCuda() as cuda, torch.no_grad():
        runner = step_of(objective=objective)
        cuda.watch_copies()
        assert measure_step(runner).device == CUDA


def test_the_flags_of_a_step_are_its_one_read():
    with FakeCuda():
        with pytest.raises(DataDependentOutputException):
            StepBuffer(4, CUDA).flags()


# Each plants one error into a step; the exception says which it was.
def a_read(runner):
    usual = runner._groups_of
    runner._groups_of = lambda micro: usual(micro) + int(micro.labels.sum().item() * 0)


def a_size_by_values(runner):
    usual = runner._weights_of

    def weights(found):
        weights_N = usual(found)
        return weights_N[weights_N > 0]

    runner._weights_of = weights


def a_tensor_on_the_cpu(runner):
    runner._groups_of = lambda micro: torch.zeros(len(micro.token_index), dtype=torch.long)


def a_wrong_dtype(runner):
    layer = runner.engine.module.model.model.layers[1].mlp[0].up_proj
    wide = torch.zeros(layer.weight.shape, dtype=torch.float32, device=CUDA)
    layer.weight = torch.nn.Parameter(wide, requires_grad=False)


PLANTED = [
    (a_read, DataDependentOutputException),
    (a_size_by_values, DynamicOutputShapeException),
    (a_tensor_on_the_cpu, FakeTensorDeviceMismatchError),
    (a_wrong_dtype, MixedDtypes),
]


@pytest.mark.parametrize("plant, named", PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
def test_a_planted_error_fails_by_its_name(plant, named):
    with FakeCuda(), torch.no_grad():
        runner = step_of()
        plant(runner)
        with pytest.raises(named):
            measure_step(runner)


def test_a_copy_that_waits_for_the_device_fails_by_its_name(monkeypatch):
    from gdrt_ds.training import step

    monkeypatch.setattr(step, "to_device", lambda values, device: torch.from_numpy(values).to(device))
    with FakeCuda() as cuda, torch.no_grad():
        runner = step_of()
        cuda.watch_copies()
        with pytest.raises(BlockingCopy, match="step.py:_sums_over_groups copies"):
            measure_step(runner)


@pytest.mark.parametrize("scoring", ["renormalised", "full"])
def test_a_catalogue_is_scored_on_the_device_without_a_read_or_a_wait(scoring):
    rng = np.random.default_rng(0)
    titles = {tuple(rng.integers(3, 250, 4)) + (2,) for _ in range(50)}
    trie = TokenTrie.build([list(map(int, title)) for title in titles])
    prompts = [[5, 6, 7, *range(10, 10 + n)] for n in (3, 9)]
    with FakeCuda() as cuda, torch.no_grad():
        model = tiny_llama(CUDA, "sdpa", torch.bfloat16).eval()
        scorer = CatalogueScorer(PromptReader(model, [5, 6, 7]), trie, scoring, tokens_per_slice=40)
        cuda.watch_copies()
        # What follows is added up on the CPU, from numbers that are not there.
        scorer._add_up = lambda logits, normaliser: (logits, normaliser)
        logits, normaliser = scorer.score(prompts)
    assert logits.shape == (2, len(scorer.plan.edge_token))
    assert logits.device == CUDA
    assert (normaliser is None) == (scoring == "renormalised")
