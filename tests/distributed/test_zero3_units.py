"""Adapted layers as units of ZeRO-3: fewer hooks, the same numbers, and no adapter that is left out."""

import pytest

from tests.distributed.scenario_units import CASES, LAYERS
from tests.forked import run_scenario

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_scenario("scenario_units", tmp_path_factory.mktemp("units"))


@pytest.mark.parametrize("case", CASES)
def test_steps_are_bitwise_those_with_hooks_on_every_module(report, case):
    for rank in report:
        everywhere, units = rank[case]["everywhere"], rank[case]["units"]
        assert units["hooks"] < 0.55 * everywhere["hooks"]
        assert units["losses"][0] != units["losses"][-1], "it trains"
        for key in ("losses", "norms", "weights"):
            assert units[key] == everywhere[key], key


def test_of_each_adapted_layer_one_module_has_hooks(report):
    """Two hooks each in the forward; seven adapted layers of five modules, of which four have none."""
    everywhere, units = (report[0]["a 4-bit base"][which]["hooks"] for which in ("everywhere", "units"))
    assert everywhere - units >= 2 * LAYERS * 7 * 4


def test_units_whose_gradients_deepspeed_reduces_cannot_be_trained(report):
    """Why gradients are reduced one by one. If this fails, DeepSpeed mended it, and a patch can go."""
    for rank in report:
        assert "must match the size of tensor" in rank["error of DeepSpeed"]


def test_the_head_of_a_model_that_reads_its_embedding_itself_is_checked(report):
    for rank in report:
        line, freed = rank["head of Gemma 4"]
        assert "the model's own log-probabilities, within 0.0e+00 nats" in line
        assert freed
