"""Which validation is the best: only one whose losses are all finite."""

from __future__ import annotations

import math

import pytest
import torch

from gdrt_ds.config import DroSection
from gdrt_ds.dro.groups import UNSEEN
from gdrt_ds.training.validation import Best, Validation, by_group


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


def test_a_label_that_train_lacks_is_in_no_group():
    losses = torch.tensor([1.0, 3.0, 9.0, 2.0], dtype=torch.float64)
    group_loss, worst, objective = by_group(losses, torch.tensor([0, 1, UNSEEN, 0]), 3, DroSection(tau=1e9))
    assert group_loss[:2].tolist() == [1.5, 3.0] and group_loss[2].isnan()
    assert worst == 3.0
    assert objective == pytest.approx(2.0)  # at a large tau, the mean of the three


def test_patience_counts_the_validations_behind_the_best_one():
    best = Best({"step": 4, "value": 1.0}, 2)
    assert best.is_given_up(2)
    assert not best.is_given_up(3) and not best.is_given_up(None) and not Best().is_given_up(1)
