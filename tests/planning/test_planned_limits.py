"""Every numeric setting at its stated limits, with real data: planned, or refused by name. Nothing is loaded.

tests/config/test_every_number.py has what no setting takes: NaN, infinities, negatives, absurd sizes. Here
are the values that a setting takes by itself. Some of them do not fit the data or the model; then the plan
says which setting that is.
"""

from __future__ import annotations

import pytest

from gdrt_ds.config import load_config
from gdrt_ds.config.base import LARGEST
from gdrt_ds.errors import UserError
from gdrt_ds.planning.plan import print_plan
from tests.config.test_every_number import limits, numbers_in, places

SMALLEST = 1e-300  # of the numbers that have to be above 0
LARGE = 1e300  # of those that have no upper limit
LISTS = {
    "train.betas": ["[0, 0]", "[0.999999, 0.999999]"],
    "data.split_ratio": ["[1, 0, 0]", "[0.0001, 0, 0.9999]", "[0.6, 0.2, 0.2]"],
    "dro.frozen_weights": ["[1000000, 0, 0, 0]", "[1e-300, 1e-300, 1e-300, 1e-300]", "[1]"],
}
TINY = [
    "data.planted={num_items: 8, num_popular: 2, num_train: 60, num_valid: 10, num_test: 10}",
    "model.path=tiny-random",
    "train.global_batch=4",
    "groups.num=4",
]


def taken() -> list[str]:
    """`key=value` of the limits of every numeric setting."""
    found = []
    for key, field in places().items():
        if key in LISTS:
            found += [f"{key}={value}" for value in LISTS[key]]
            continue
        limit = limits(field.metadata)
        if key == "train.micro_batch":
            limit = {"ge": 1}
        whole = numbers_in(field.annotation) == {int}
        low = limit.get("ge", SMALLEST if "gt" in limit else -LARGE)
        high = limit.get("le", LARGEST if whole else LARGE)
        if "lt" in limit:
            high = limit["lt"] - 1e-9
        found += [f"{key}={low}", f"{key}={high}"]
    return [*found, "dro.tau=.inf"]


@pytest.mark.parametrize("override", taken())
def test_a_limit_is_planned_or_refused_by_name(override, tmp_path):
    key = override.partition("=")[0]
    try:
        config = load_config(None, [*TINY, f"run.dir={tmp_path}", override])
        print_plan(config, 1, full=True, quiet=True)
    except UserError as refusal:
        assert key in str(refusal)
