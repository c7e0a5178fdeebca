"""Tests of the learning rate."""

from __future__ import annotations

import pytest

from gdrt_ds.config import load_config
from gdrt_ds.training.optimizer import learning_rate


def test_the_learning_rate_is_a_function_of_the_step():
    run = load_config(None, ["train.lr=1.0", "train.warmup_steps=4", "train.schedule=cosine"])
    assert [learning_rate(s, run, 12) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert (
        learning_rate(4, run, 12) == 1.0
        and learning_rate(8, run, 12) == pytest.approx(0.5)
        and learning_rate(12, run, 12) == pytest.approx(0.0)
    )
    linear = load_config(None, ["train.lr=1.0", "train.warmup_steps=0", "train.schedule=linear"])
    assert [learning_rate(s, linear, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate(99, load_config(None, ["train.lr=0.5", "train.schedule=constant"]), 100) == 0.5
