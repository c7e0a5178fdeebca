"""Tests of the facts an objective needs beside losses."""

import json

import pytest
import torch

from gdrt_ds.errors import UserError
from gdrt_ds.training.step_inputs import frozen_weights

CPU = torch.device("cpu")


def write_weights(folder, rows):
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"group_weight": row}) + "\n" for row in rows), encoding="utf-8"
    )
    return str(folder)


def test_frozen_weights_of_a_run_are_the_mean_of_its_last_steps(tmp_path):
    run = write_weights(tmp_path, [[0.9, 0.1]] * 5 + [[0.2, 0.8]] * 10 + [[0.4, 0.6]] * 10)
    assert torch.allclose(frozen_weights(run, 2, CPU), torch.tensor([0.3, 0.7], dtype=torch.float64))


def test_a_group_that_was_never_present_weighs_nothing_and_spoils_nothing(tmp_path):
    run = write_weights(tmp_path, [[0.25, None, 0.75], [None, None, 1.0]])
    q = frozen_weights(run, 3, CPU)
    assert q[1] == 0 and torch.isfinite(q).all() and q.sum() == pytest.approx(1.0)


def test_a_listed_weight_of_zero_leaves_its_group_out():
    assert frozen_weights([0, 1, 3], 3, CPU).tolist() == [0, 0.25, 0.75]


@pytest.mark.parametrize("given, word", [([0.5, 0.5], "3 groups"), ("nowhere", "metrics.jsonl")])
def test_frozen_weights_that_do_not_fit_are_refused(given, word):
    with pytest.raises(UserError, match=word):
        frozen_weights(given, 3, CPU)
