"""Which validation is the best: only one whose losses are all finite."""

from __future__ import annotations

import math

import pytest
import torch

from gdrt_ds.training.validation import Best, Validation


def at(step: int, nll: float = 1.0, worst: float = 2.0, objective: float = 1.5) -> Validation:
    return Validation(step, nll, worst, objective, torch.tensor([nll, worst]))


@pytest.mark.parametrize("select_by", ["nll", "worst_group", "objective"])
@pytest.mark.parametrize("broken", [at(1, nll=math.nan), at(1, worst=math.inf), at(1, objective=-math.inf)])
def test_a_validation_that_is_not_finite_is_never_the_best(select_by, broken):
    assert Best().after(broken, select_by) == Best(None, 1)
    good = Best().after(at(2), select_by)
    assert good.figures is not None and good.figures["step"] == 2
    assert good.after(broken, select_by) == Best(good.figures, 1)


def test_the_lower_figure_is_the_better_one():
    best = Best().after(at(1, nll=3.0), "nll").after(at(2, nll=2.0), "nll").after(at(3, nll=2.5), "nll")
    assert best.figures is not None
    assert (best.figures["step"], best.figures["value"], best.later) == (2, 2.0, 1)
