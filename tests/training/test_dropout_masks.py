"""On what dropout masks depend: the seed, the step, the micro-batch and the rank, and on nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from gdrt_ds.config import RunConfig
from gdrt_ds.runtime import Runtime
from gdrt_ds.training.step import StepRunner


def mask(seed: int = 3, step: int = 5, micro_batch: int = 1, rank: int = 1) -> list[bool]:
    """The first mask that a forward would draw; whatever was drawn before it must not matter."""
    config = RunConfig.model_validate({"train": {"seed": seed}})
    runner = SimpleNamespace(
        config=config, runtime=Runtime(rank=rank, local_rank=rank, world=4, local_world=4)
    )
    torch.rand(17)
    StepRunner._seed(runner, step, micro_batch)
    return (torch.nn.functional.dropout(torch.ones(64), 0.5) > 0).tolist()


def test_a_micro_batch_of_a_step_draws_the_same_masks_again():
    """The second pass of a step and a resumed run need that."""
    assert mask() == mask()


def test_another_seed_step_micro_batch_or_rank_draws_other_masks():
    drawn = [mask(), mask(seed=4), mask(step=6), mask(micro_batch=0), mask(rank=0), mask(micro_batch=2)]
    assert all(first != second for k, first in enumerate(drawn) for second in drawn[:k])
    assert mask(step=1, micro_batch=0) != mask(step=0, micro_batch=1), "the four are not added up"
