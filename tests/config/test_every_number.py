"""Every numeric setting meets its limits, NaN, the infinities and absurd sizes.

Each value is taken, with a meaning that stands in the table below or within the stated range, or it is
refused by name. No model is loaded here.
"""

from __future__ import annotations

import math
import typing

import pytest
from pydantic import BaseModel

from gdrt_ds.config import load_config
from gdrt_ds.config.base import LARGEST
from gdrt_ds.config.explaining import BOUNDS, fields_of, is_section
from gdrt_ds.errors import UserError

INFINITE = {"dro.tau": "the plain mean over the prior"}
"""The settings for which infinity means something."""


def numbers_in(annotation) -> set[type]:
    """int and float, where an annotation allows them, in a list too."""
    if annotation in (int, float):
        return {annotation}
    return {kind for part in typing.get_args(annotation) for kind in numbers_in(part)}


def places() -> dict[str, typing.Any]:
    """key -> field of every setting that takes a number or a list of numbers."""
    return {
        key: field
        for key, field in fields_of().items()
        if not is_section(field) and numbers_in(field.annotation)
    }


def limits(metadata) -> dict[str, float]:
    return {
        name: getattr(item, name)
        for item in metadata
        for name in BOUNDS
        if getattr(item, name, None) is not None
    }


def given(key: str, number: str) -> str:
    """`key=number`, or the number in each place of a list."""
    lengths = {"train.betas": 2, "data.split_ratio": 3, "dro.frozen_weights": 2}
    if key in lengths:
        return f"{key}=[{', '.join([number] * lengths[key])}]"
    return f"{key}={number}"


def value_of(config: BaseModel, key: str):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_all_numbers_are_found():
    assert len(places()) >= 40
    assert {"train.betas", "data.split_ratio", "dro.frozen_weights", "train.micro_batch", "dro.tau"} <= set(
        places()
    )


@pytest.mark.parametrize("key", sorted(places()))
def test_nan_and_infinity_are_refused_by_name_unless_they_mean_something(key):
    for number in (".nan", "nan", ".inf", "inf", "-.inf", "-inf"):
        if key in INFINITE and number in (".inf", "inf"):
            assert value_of(load_config(None, [given(key, number)]), key) == math.inf
            continue
        with pytest.raises(UserError) as caught:
            load_config(None, [given(key, number)])
        assert f"command line: {key} = " in caught.value.problem, number
        assert key in caught.value.fix


@pytest.mark.parametrize("key", sorted(places()))
def test_negative_and_absurd_numbers_are_refused_by_name(key):
    absurd = ["-1", "-1e30", str(-(10**30)), str(10**30)]
    if key == "data.min_rating":  # ratings may be negative
        absurd = []
    if key in ("data.min_rating", "train.grad_clip", "train.weight_decay"):
        absurd = [number for number in absurd if number.startswith("-")]  # any finite size has its meaning
    if key == "dro.tau":
        absurd = ["-1", "-1e30"]
    for number in absurd:
        with pytest.raises(UserError) as caught:
            load_config(None, [given(key, number)])
        assert key in caught.value.problem, number


@pytest.mark.parametrize("key", sorted(places()))
def test_the_stated_limits_are_the_ones_that_hold(key):
    found = limits(places()[key].metadata)
    kind = int if numbers_in(places()[key].annotation) == {int} else float
    for name, limit in found.items():
        outside = limit
        if name in ("ge", "le"):
            assert value_of(load_config(None, [f"{key}={kind(limit)}", *_beside(key)]), key) == limit
            outside = limit + (1 if kind is int else 1e-3) * (1 if name == "le" else -1)
        with pytest.raises(UserError, match=key):
            load_config(None, [f"{key}={outside}"])
    if kind is int and "le" not in found:
        assert value_of(load_config(None, [given(key, str(LARGEST)), *_beside(key)]), key) == LARGEST


def _beside(key: str) -> list[str]:
    """What has to be set too, for a limit to be no contradiction."""
    return {
        "data.min_history": [f"data.history_length={LARGEST}"],
        "model.tiny.heads": ["model.tiny.hidden=1024", "model.tiny.kv_heads=1"],
        "model.tiny.kv_heads": ["model.tiny.hidden=1024", "model.tiny.heads=64"],
    }.get(key, [])
