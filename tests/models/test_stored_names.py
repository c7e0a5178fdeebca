"""Which stored tensor is which parameter, where transformers renames while it loads."""

from types import SimpleNamespace

import pytest

from gdrt_ds.models.sharded_loading import CannotShard, _stored_names
from gdrt_ds.models.skeleton import skeleton
from tests.models.family_models import family_config

NAME, EARLIER = "model.language_model.norm.weight", "language_model.norm.weight"


def names_of(stored, wanted):
    model = skeleton(family_config("gemma3_images", 120), False)
    return _stored_names(model, SimpleNamespace(tensors=dict.fromkeys(stored)), wanted)


def test_a_name_of_an_earlier_layout_is_found_under_todays():
    assert names_of([EARLIER], {NAME}) == {NAME: EARLIER}


def test_a_stored_name_that_is_right_is_not_renamed():
    assert names_of([EARLIER], {EARLIER}) == {EARLIER: EARLIER}


def test_two_stored_tensors_that_are_one_of_the_models_are_refused():
    with pytest.raises(CannotShard, match=f"{NAME} and {EARLIER} are both {NAME}"):
        names_of([NAME, EARLIER], {NAME})
