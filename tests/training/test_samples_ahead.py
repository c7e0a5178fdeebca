"""The reference of `dro.excess` is scored on every sample that a run still takes, wherever it goes on."""

from __future__ import annotations

import numpy as np
import pytest

from gdrt_ds.batches import BatchPlan
from gdrt_ds.training.run import samples_ahead


@pytest.mark.parametrize("num_samples, batch", [(88, 16), (88, 8), (17, 16), (100, 7)])
def test_every_sample_of_the_steps_to_come_is_among_them(num_samples, batch):
    plan = BatchPlan(np.full(num_samples, 6), batch, batch, 1, 0)
    total = 40
    for first in range(total):
        ahead = set(samples_ahead(plan, num_samples, first, total).tolist())
        for step in range(first, total):
            assert set(plan.samples(step).tolist()) <= ahead, (first, step)


def test_a_short_rest_is_scored_on_its_own_samples_alone():
    plan = BatchPlan(np.full(1000, 6), 16, 16, 1, 0)
    assert len(samples_ahead(plan, 1000, 3, 5)) == 32
    assert len(samples_ahead(plan, 1000, 5, 5)) == 0
