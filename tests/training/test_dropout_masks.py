"""On what a forward depends: dropout masks on seed, step and prefix, random numbers on more."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from gdrt_ds.config import RunConfig
from gdrt_ds.runtime import Runtime
from gdrt_ds.training.step import StepRunner
from tests.batches.test_tree_attention import random_tree_store


def runner(seed: int = 3, rank: int = 1):
    config = RunConfig.model_validate({"train": {"seed": seed}})
    return SimpleNamespace(config=config, runtime=Runtime(rank=rank, local_rank=rank, world=4, local_world=4))


def random_numbers(seed: int = 3, step: int = 5, micro_batch: int = 1, rank: int = 1) -> list[float]:
    """The first numbers that a forward would draw; whatever was drawn before it must not matter."""
    torch.rand(17)
    StepRunner._seed(runner(seed, rank), step, micro_batch)
    return torch.rand(8).tolist()


def test_a_micro_batch_of_a_step_draws_the_same_numbers_again():
    """The second pass of a step and a resumed run need that where attention has dropout."""
    assert random_numbers() == random_numbers()


def test_another_seed_step_micro_batch_or_rank_draws_other_numbers():
    drawn = [
        random_numbers(),
        random_numbers(seed=4),
        random_numbers(step=6),
        random_numbers(micro_batch=0),
        random_numbers(rank=0),
        random_numbers(micro_batch=2),
    ]
    assert all(first != second for k, first in enumerate(drawn) for second in drawn[:k])
    first, second = random_numbers(step=1, micro_batch=0), random_numbers(step=0, micro_batch=1)
    assert first != second, "the four are not added up"


class Begun(Exception):
    """Carries the keys of the forward that would begin."""


def keys_of(samples, step=5, seed=3, rank=1, index=0) -> torch.Tensor:
    """The keys with which a step's micro-batch enters the model."""
    own = StepRunner.__new__(StepRunner)
    vars(own).update(vars(runner(seed, rank)))
    own.packing, own.prefix_length, own.pad_id = "none", 0, 2

    def engine(micro, *_):
        raise Begun(micro.keys)

    store = random_tree_store(0)
    own.engine = engine
    own.tokens = SimpleNamespace(
        store=store,
        history_free=None,
        groups=np.zeros(store.target_offsets[-1]),
        num_groups=1,
        trie_node=None,
    )
    own.temperature, own.top_k = 1.0, None
    try:
        own._forward(np.asarray(samples), step, index)
    except Begun as begun:
        return begun.args[0]
    raise AssertionError("no forward began")


def test_keys_hang_on_seed_step_and_prefix_and_not_on_rank_or_micro_batch():
    base = keys_of([0, 1, 2])
    assert torch.equal(keys_of([0, 1, 2], rank=3, index=2), base)
    assert torch.equal(keys_of([1])[0], base[1][: keys_of([1]).shape[1]])
    inside = base != 0
    for other in (keys_of([0, 1, 2], step=6), keys_of([0, 1, 2], seed=4)):
        assert (other != base)[inside].all()
